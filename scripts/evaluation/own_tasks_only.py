"""lmms_eval's command line, without an index of the thousand tasks that come with it.

Reading their descriptions takes longer than asking 500 questions. lmms_eval has the option, but not on its
command line. A program: scripts/evaluation/lmms.py starts it in lmms_eval's environment.
"""

import runpy

from lmms_eval.tasks import TaskManager


def main() -> None:
    original = TaskManager.__init__

    def initialize(self: TaskManager, *args: object, **options: object) -> None:
        original(self, *args, **{**options, "include_defaults": False})

    TaskManager.__init__ = initialize
    runpy.run_module("lmms_eval", run_name="__main__")


if __name__ == "__main__":
    main()
