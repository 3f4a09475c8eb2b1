"""What the eigenvalues of an operator say, from products, with error bars."""

from woodbury.spectra.condition_number import condition_number
from woodbury.spectra.density import SpectralDensity, density
from woodbury.spectra.diagonal import diagonal
from woodbury.spectra.effective_dimension import effective_dimension
from woodbury.spectra.eigen_status import EigenStatus
from woodbury.spectra.eigenpairs import EigenMethod, Eigenpairs, eigenpairs
from woodbury.spectra.estimate import Estimate
from woodbury.spectra.frobenius import frobenius_norm
from woodbury.spectra.hutch_plus_plus import HutchPlusPlus
from woodbury.spectra.hutchinson import Hutchinson
from woodbury.spectra.lobpcg import LOBPCG
from woodbury.spectra.logdet import logdet
from woodbury.spectra.method import Exact, Method
from woodbury.spectra.slq import SLQ
from woodbury.spectra.thick_restart import ThickRestartLanczos
from woodbury.spectra.trace import trace
from woodbury.spectra.xdiag import XDiag
from woodbury.spectra.xnystrace import XNysTrace
from woodbury.spectra.xtrace import XTrace

__all__ = [
    "LOBPCG",
    "SLQ",
    "EigenMethod",
    "EigenStatus",
    "Eigenpairs",
    "Estimate",
    "Exact",
    "HutchPlusPlus",
    "Hutchinson",
    "Method",
    "SpectralDensity",
    "ThickRestartLanczos",
    "XDiag",
    "XNysTrace",
    "XTrace",
    "condition_number",
    "density",
    "diagonal",
    "effective_dimension",
    "eigenpairs",
    "frobenius_norm",
    "logdet",
    "trace",
]
