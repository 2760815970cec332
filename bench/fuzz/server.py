"""The HTTP service of a small random model, in this process without Ray: `python -m bench.fuzz.server`.

Says `listening on PORT` when it is ready; serves until SIGINT or SIGTERM. Options are fields of
`revit_fast.deploy.classifier.Limits`, and `--wait-s`, the longest time that an image waits for others.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import warnings

from bench.fuzz.decode import small_pipe
from revit_fast.deploy.classifier import Limits
from revit_fast.deploy.server import Server, listening_socket
from revit_fast.deploy.service import Service


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz.server")
    parser.add_argument("--wait-s", type=float, default=0.02)
    for field in dataclasses.fields(Limits):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    limits = vars(parser.parse_args())
    warnings.filterwarnings("ignore", module="PIL")
    service = Service(small_pipe(max_wait_s=limits.pop("wait_s")), Limits(**limits))
    listening = listening_socket("127.0.0.1", 0)
    port = listening.getsockname()[1]
    asyncio.run(Server(service, lambda: print(f"listening on {port}", flush=True)).serve([listening]))
    service.close()


if __name__ == "__main__":
    main()
