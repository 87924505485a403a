"""Which assembler Triton takes for a Hopper GPU, inside ``older_assembler`` and out: one JSON object for each case."""

from __future__ import annotations

import json
import os
import threading
from contextlib import suppress
from pathlib import Path

from absent_gpu import pretend
from triton import knobs
from triton.backends.nvidia import compiler

from flashtile.backends.assembler import older_assembler


def report(case: str, options: dict[str, int] | None = None) -> None:
    taken = Path(compiler.get_ptxas(90).path).name
    key = compiler.get_ptxas_version(90)
    print(json.dumps({"case": case, "taken": taken, "options": options, "key": key}))


def in_another_thread(began: threading.Event, goes_on: threading.Event) -> None:
    with older_assembler():
        began.set()
        goes_on.wait()
        report("inside, in another thread")


def main() -> None:
    report("outside")
    pretend("sm_80")
    with older_assembler() as options:
        report("another GPU", options)
    pretend("sm_90")
    with older_assembler() as options:
        report("inside", options)
        with older_assembler() as options:
            report("twice inside", options)
        report("once more")
    report("behind")
    with suppress(KeyboardInterrupt), older_assembler():
        raise KeyboardInterrupt
    report("behind an interrupt")

    began, goes_on = threading.Event(), threading.Event()
    other = threading.Thread(target=in_another_thread, args=(began, goes_on))
    other.start()
    began.wait()
    report("beside another thread")
    goes_on.set()
    other.join()

    own = knobs.nvidia.ptxas_blackwell.path
    with knobs.nvidia.scope():
        knobs.nvidia.ptxas_blackwell = own
        os.environ.pop("TRITON_PTXAS_BLACKWELL_PATH")
        with older_assembler() as options:
            report("chosen by a knob", options)
    os.environ["TRITON_PTXAS_BLACKWELL_PATH"] = own
    with older_assembler() as options:
        report("chosen by a variable", options)


if __name__ == "__main__":
    main()
