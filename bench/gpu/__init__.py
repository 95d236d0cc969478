"""The GPU core on hardware: run.sh does all in one call, prepare.sh packs what that needs."""

from .table import Sizes, main, mixture, report, timings

__all__ = ["Sizes", "main", "mixture", "report", "timings"]
