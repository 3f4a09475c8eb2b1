"""Find wrong labels in a table from Python, and write the report.

The table is the wine data of scikit-learn with a text column and gaps added, and eight labels made
wrong. Nothing is said about the columns: what each of them is, is recognised.
"""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_wine

import woodbury


def main() -> None:
    """Make a table with wrong labels, find them, write the report to the current folder."""
    generator = np.random.default_rng(0)
    wine = load_wine(as_frame=True)
    table = wine.frame.rename(columns={"target": "cultivar"})
    table["cultivar"] = np.array(["north", "south", "west"])[table["cultivar"]]
    table.loc[generator.choice(len(table), 20, replace=False), "alcohol"] = np.nan
    wrong = generator.choice(len(table), 8, replace=False)
    others = {"north": "south", "south": "west", "west": "north"}
    table.loc[wrong, "cultivar"] = table.loc[wrong, "cultivar"].map(others)

    found = woodbury.clean(table, label="cultivar", seed=0)
    print(found.suspects[["row", "label", "suggested_label", "error_probability"]])
    top = set(found.rows.nsmallest(len(wrong), "rank")["row"])
    print(f"{len(top & set(wrong.tolist()))} of the {len(wrong)} wrong labels are the first 8")
    print("report:", found.report("report.html"))


if __name__ == "__main__":
    main()
