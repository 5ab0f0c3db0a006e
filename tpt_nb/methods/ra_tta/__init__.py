"""RA-TTA: the method, its texts, transport plans, and image databases without labels.

Nothing here may import a run. A file format of databases goes into ``database.py``, a way to make
one into ``build.py``.
"""

from tpt_nb.methods.ra_tta.adapt import (
    METHOD,
    Knowledge,
    Options,
    Trace,
    prototypes_of,
    quantile_over_views,
    ra_tta,
    select_descriptions,
    trace,
)
from tpt_nb.methods.ra_tta.authors import (
    DATABASES,
    PRE_TEMPLATE,
    SCRIPTS,
    Script,
    find_database,
    find_descriptions,
    open_database,
    script_of,
)
from tpt_nb.methods.ra_tta.build import (
    Pictures,
    build,
    database_scene,
    database_spec,
    embedded_database,
    folder_pictures,
    iconshift_pictures,
    style_of,
    write_database,
)
from tpt_nb.methods.ra_tta.database import Database, read_database
from tpt_nb.methods.ra_tta.texts import (
    DESCRIPTIONS,
    Texts,
    depictions,
    embed_texts,
    read_descriptions,
)
from tpt_nb.methods.ra_tta.transport import monotone_plan, sinkhorn, transport_plan

__all__ = [
    "METHOD", "Knowledge", "Options", "Trace", "prototypes_of", "quantile_over_views", "ra_tta",
    "select_descriptions", "trace",
    "Pictures", "build", "database_scene", "database_spec", "embedded_database", "folder_pictures",
    "iconshift_pictures", "style_of", "write_database",
    "DATABASES", "PRE_TEMPLATE", "SCRIPTS", "Script", "find_database", "find_descriptions",
    "open_database", "script_of",
    "Database", "read_database",
    "DESCRIPTIONS", "Texts", "depictions", "embed_texts", "read_descriptions",
    "monotone_plan", "sinkhorn", "transport_plan",
]  # fmt: skip
