"""Do tokens go where the one before went? The table of Mixtral's paper (2401.04088), of any run.

python -m explorer.survey.locality RUN
"""

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import pandas as pd

from capture.errors import CaptureError
from explorer.errors import ExplorerError
from explorer.metrics.agreement import chance_any_repeat
from explorer.metrics.coactivation import repetition
from explorer.queries.load import routing
from explorer.run import Run, open_run
from explorer.text import visible

ERROR = 2


def locality(run: Run, *, seed: int = 0) -> pd.DataFrame:
    """Return how often experts repeat from a token to the next, by layer, site and domain.

    Parameters
    ----------
    run : Run
        Recorded at level ``ids`` or above. Decoded tokens are left out.
    seed : int
        Of the random partners, see :func:`explorer.metrics.coactivation.repetition`.

    Returns
    -------
    DataFrame
        ``domain`` (``""`` = all texts), ``layer``, ``site``; ``first``, ``first_chance``, ``any``,
        ``any_chance`` and ``pairs`` of :class:`explorer.metrics.coactivation.Repetition`; and
        ``first_even``, ``any_even``, what chance would give with equal loads.
    """
    tokens = run.query(
        "SELECT token_id, prompt_id, coalesce(domain, '') AS domain FROM tokens "
        "JOIN prompts USING (prompt_id) WHERE phase = 'prompt' ORDER BY prompt_id, position"
    )
    order = tokens["token_id"].to_numpy(np.int64)
    rows = []
    for info in run.sites:
        found = routing(run, info.layer, site=info.site, phase="prompt")
        by_id = np.argsort(found.token_id)
        at = by_id[np.searchsorted(found.token_id, order, sorter=by_id)]
        ids = found.expert_ids[at]
        for domain in ["", *sorted(set(tokens["domain"]) - {""})]:
            here = np.ones(len(tokens), bool) if not domain else (tokens["domain"] == domain)
            prompts = tokens["prompt_id"].to_numpy(np.int64)[here]
            measured = repetition(ids[np.asarray(here)], prompts, seed=seed)
            rows.append(
                {
                    "domain": domain,
                    "layer": info.layer,
                    "site": info.site,
                    **measured._asdict(),
                    "first_even": 1 / info.n_experts,
                    "any_even": chance_any_repeat(info.n_experts, ids.shape[1]),
                }
            )
    return pd.DataFrame(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of a run and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m explorer.survey.locality", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run file")
    options = parser.parse_args(arguments)
    try:
        with open_run(options.run) as run:
            table = locality(run)
    except (CaptureError, ExplorerError) as error:
        sys.stderr.write(f"{error}\n")
        return ERROR
    table["domain"] = table["domain"].replace("", "all").map(visible)
    text = table.to_string(index=False, na_rep="–", float_format=lambda v: f"{v:.3f}")
    sys.stdout.write(f"{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
