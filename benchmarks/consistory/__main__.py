"""Draws the prompt sets of ConsiStory+ on ComfyUI servers and measures the pictures.

    python -m storyloom.benchmarks.consistory --prompts consistory+.yaml --server http://gpu1:8188 --server http://gpu2:8188
    python -m storyloom.benchmarks.consistory --prompts demo --method vanilla --method svr+ipca

Every set of the file is drawn with every --method on the next free server. out/consistory/ holds each set's pictures,
texts and measures, and `table.md` with the published values. The same command resumes a run that was stopped or killed;
if a server ends, another draws its set. Without --server, one ComfyUI is started here.

Methods: vanilla (one prompt per frame), or one of none, npr, svr, svr-eot (the story as one prompt) and ipca and csa,
joined with +: svr-eot+ipca (published), csa, csa+svr+ipca, ...
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from ...scripts import comfyui
from .options import parse
from .plan import folder_of, plan_of
from .prompts import PromptFileError
from .run import listed, results, run
from .schedule import NoServersError
from .servers import print_status
from .store import Store, StoreError


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if sets failed, 2 if the run could not continue, 130 if it was stopped."""
    options = parse(arguments, __doc__)
    try:
        plan = plan_of(options)
        store = Store(folder_of(options, plan))
        if options.list:
            print(listed(plan, store))
            return 0
        with store.locked(plan.run_settings):
            failed, reasons = run(plan, store, options)
            text = results(plan, store)
            store.write(store.folder / "table.md", text.encode())
        print(f"\n{text}")
        for reason in reasons:
            print_status(reason)
        print_status(f"Pictures, measures and table.md: {store.folder}")
        for key, reason in failed.items():
            print_status(f"Failed: {key}: {reason}")
        if failed:
            print_status(f"{len(failed)} sets failed; run the same command to retry them.")
        return 1 if failed else 0
    except KeyboardInterrupt:
        print_status("\nStopped. Run the same command to resume.")
        return 130
    except NoServersError as error:
        print_status(f"{error} Run the same command to resume.")
    except (PromptFileError, StoreError, ImportError, ValueError, OSError, comfyui.ComfyUIError) as error:
        print_status(str(error))
    return 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
