"""Changes of the values of a comparison file that leave its columns as they are."""

from explorer.comparison.results_file import TABLES

# what no column of the kind may hold, and what a stranger may write all the same
_NEVER = {
    "DOUBLE": ("'nan'::DOUBLE", "'inf'::DOUBLE", "-1e300", "1e300"),
    "FLOAT": ("'nan'::FLOAT", "'inf'::FLOAT", "1e38"),
    "INTEGER": ("-2147483648",),
    "BIGINT": ("-1", "9223372036854775807"),
    "VARCHAR": ("repeat('x', 20000)",),
    "FLOAT[]": ("['nan'::FLOAT]", "[NULL, 1]", "[1e38]"),
    "SMALLINT[]": ("[-5]", "[NULL]"),
    "BOOLEAN": (),
}
_ODD = {
    "DOUBLE": ("NULL", "0", "1", "-0.0"),
    "FLOAT": ("NULL", "0", "1"),
    "INTEGER": ("NULL", "0", "1", "100000"),
    "BIGINT": ("NULL", "0", "1000000000000000"),
    "VARCHAR": ("NULL", "''", "'<b>:material/x: {0} %s'", "'nan'", "chr(8238) || repeat('é', 400)"),
    "FLOAT[]": ("NULL", "[]", "[0, 0]"),
    "SMALLINT[]": ("NULL", "[]", "[0, 0]"),
    "BOOLEAN": ("NULL", "true", "false"),
}
# how the file is written, and documents: their values are told apart elsewhere
_OF_FORMAT = {("comparison", name) for name in ("format_version", "settings", "packages")}
CONTRADICTIONS = {
    "a long document": "UPDATE comparison SET settings = repeat('x', 1000001)",
    "a date that is none": "UPDATE comparison SET created_at = 'yesterday'",
    "a date of another age": "UPDATE comparison SET created_at = '294000-01-01'",
    "a share above 1": "UPDATE results SET agreement = 1.5",
    "a share below 0": "UPDATE results SET jaccard = -0.5",
    "a negative standard error": "UPDATE results SET loss_se = -1",
    "a loss of a million": "UPDATE results SET loss_change = 1e7",
    "a result of no router": "UPDATE results SET router = NULL",
    "a choice of no mode": "UPDATE choices SET mode = NULL",
    "more weights than experts": "UPDATE choices SET weights = [1, 2, 3, 4, 5]",
    "more chosen than experts": "UPDATE comparison SET n_experts = 4, top_k = 5",
    "a layer before the first": "UPDATE results SET layer = -1",
    "many families": "INSERT INTO results (router, mode, family)"
    " SELECT 'a', 'live', 'f' || range FROM range(101)",
    "many results": "INSERT INTO results (router, mode) SELECT 'a', 'live' FROM range(200001)",
    "many routers": "INSERT INTO routers (router) SELECT 'r' || range FROM range(10001)",
}


def never(nth):
    """Yield every column that something cannot be in, and the change that puts it there."""
    for table, columns in TABLES.items():
        for column, kind in columns.items():
            if (table, column) not in _OF_FORMAT and _NEVER[kind]:
                value = _NEVER[kind][nth % len(_NEVER[kind])]
                yield f"{table}.{column}", f'UPDATE {table} SET "{column}" = {value}'


N_NEVER = max(map(len, _NEVER.values()))
# a row is told by these, and a description by those
_NEEDED = {
    *(
        (table, name)
        for table, names in TABLES.items()
        for name in ("router", "mode")
        if name in names
    ),
    *(("choices", name) for name in ("text_id", "position", "layer")),
    *(("comparison", name) for name in ("created_at", "n_layers", "n_experts", "top_k")),
}


def odd(nth):
    """Yield the nth odd change of every column, which together pass."""
    for table, columns in TABLES.items():
        for column, kind in columns.items():
            value = _ODD[kind][nth % len(_ODD[kind])]
            needed = (table, column) in _NEEDED and (value == "NULL" or table == "comparison")
            if (table, column) not in _OF_FORMAT and not needed:
                yield f'UPDATE {table} SET "{column}" = {value}'


N_ODD = max(map(len, _ODD.values()))
