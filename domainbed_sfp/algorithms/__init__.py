"""The algorithms, one file each, found by their registration; called, the package lists them in a pandas frame."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


class _Package(ModuleType):
    """This package, which users of `import domainbed_sfp as dsfp` call: `dsfp.algorithms()`."""

    def __call__(self) -> pd.DataFrame:
        """Every registered algorithm, those of other packages included.

        Returns
        -------
        pandas.DataFrame
            Indexed by `name`, with columns `family`, `standing` and `reference`.

        Examples
        --------
        >>> import domainbed_sfp as dsfp
        >>> dsfp.algorithms().loc["SFP", "standing"]
        'reconstruction'
        """
        import pandas as pd

        from domainbed_sfp.algorithms import registry

        infos = [registry.get(name) for name in registry.names()]
        columns = ("name", "family", "standing", "reference")
        rows = [[getattr(info, column) for column in columns] for info in infos]
        return pd.DataFrame(rows, columns=list(columns)).set_index("name")


sys.modules[__name__].__class__ = _Package
