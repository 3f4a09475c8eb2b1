"""Which training sequences are behind what a language model or a text classifier says."""

from woodbury.apps.attribute.job import AttributeResult, attribute

__all__ = ["AttributeResult", "attribute"]
