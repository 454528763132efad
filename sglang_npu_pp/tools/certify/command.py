"""`python -m sglang_npu_pp certify`: options, the run as a whole, exit code."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

from ... import certificates
from ...builds import CORE, Known
from ...errors import CertificateError, PipelineError
from ...settings import load_settings
from ..imports import without_device_backends
from .plan import Plan, complete
from .results import Check, Report, Verdict

PASSED, RED, NOT_RUN, INTERRUPTED = 0, 1, 2, 130


def add(commands: Any) -> None:
    """Add the command to an argparse parser's commands."""
    parser = commands.add_parser(
        "certify",
        help="compare a patched server with an unpatched one here, and certify a build that is not known",
        description="Starts your server unpatched and patched in turns, compares answers, order and speed, "
        "and writes a report. A build of SGLang that is not known gets a certificate if nothing differs; "
        "patches are then in force for it. Exit code 0: nothing differs, 1: something does, 2: it could not "
        "be compared.",
        epilog="Behind -- stand the arguments of launch_server; without a model a tiny one is served.",
    )
    parser.add_argument("--rounds", type=_count, default=2, metavar="N", help="turns of each server (2)")
    parser.add_argument("--faults", action="store_true", help="also kill a scheduler of the last stage")
    parser.add_argument("--ab", action="store_true", help="also measure the switches for doubtful hardware")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the report (certify-DATE)")
    parser.add_argument(
        "--reference", type=Path, metavar="PATH", help="folder or wheel of a known release, for the diffs"
    )
    parser.add_argument(
        "--start-limit", type=float, default=1800.0, metavar="S", help="longest start of a server (1800)"
    )
    load = parser.add_argument_group("speed, by sglang.bench_serving")
    load.add_argument("--no-speed", action="store_true", help="measure none")
    load.add_argument("--prompts", type=_count, default=64, metavar="N", help="requests (64)")
    load.add_argument("--input-tokens", type=_count, default=512, metavar="N", help="of each request (512)")
    load.add_argument("--output-tokens", type=_count, default=64, metavar="N", help="of each request (64)")
    load.add_argument("--rate", type=float, default=math.inf, metavar="R", help="requests a second (all)")
    load.add_argument("--concurrency", type=_count, metavar="N", help="requests at a time (no limit)")
    load.add_argument("--dataset", default="random-ids", metavar="NAME", help="data set (random-ids)")
    load.add_argument("--load-option", action="append", default=[], metavar="X", help="one more option of it")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- ARGUMENTS", help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, _interrupt)  # else the server that is running would stay behind
    try:
        plan = plan_of(options)
        return Certification(plan).run()
    except (PipelineError, OSError, ValueError) as error:
        print(f"certify: {error}", file=sys.stderr)
        return NOT_RUN
    except ImportError as error:
        print(f"certify: {error}; use the Python that has SGLang and torch.", file=sys.stderr)
        return NOT_RUN
    except KeyboardInterrupt:
        print("certify: interrupted; no report, no certificate.", file=sys.stderr)
        return INTERRUPTED


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def plan_of(options: argparse.Namespace) -> Plan:
    """Raises ValueError for what does not fit together."""
    from .speed import Load

    arguments = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    if options.ab and options.no_speed:
        raise ValueError("--ab measures speed; leave out --no-speed.")
    if not options.start_limit > 0:
        raise ValueError("--start-limit must be above 0 s.")
    load = (
        None
        if options.no_speed
        else Load(
            options.input_tokens,
            options.output_tokens,
            options.prompts,
            options.concurrency,
            options.rate,
            options.dataset,
            tuple(options.load_option),
        )
    )
    default = Path(f"certify-{datetime.now():%Y%m%d-%H%M%S}")
    return Plan(
        arguments=complete(arguments),
        rounds=options.rounds,
        faults=options.faults,
        switches=options.ab,
        output=options.output or default,
        reference=options.reference,
        start_limit_s=options.start_limit,
        speed=load,
    )


class Certification:
    """One run: what is installed, the turns, the report, the certificate."""

    def __init__(self, plan: Plan, environ: Mapping[str, str] | None = None) -> None:
        self._plan = plan
        self._environ = dict(os.environ if environ is None else environ)
        self._began = time.monotonic()

    def run(self) -> int:
        with without_device_backends():
            from ..doctor import versions
            from . import doctor_checks

            known = versions.known_build()
            examined = doctor_checks.sections(self._plan.arguments, self._environ)
        doctor = doctor_checks.checks(examined)
        _show(doctor)
        if not known.missing:
            self._say(f"SGLang {known.build.label} is known: this is a comparison, no certificate is needed")
        logs = Path(tempfile.mkdtemp(prefix="certify-"))
        report = self._report(known, doctor, doctor_checks.versions(examined), logs)
        if report.passed:
            shutil.rmtree(logs)
        else:
            self._say(f"logs of the servers: {logs}")
        return PASSED if report.passed else RED

    def _report(
        self, known: Known, doctor: Sequence[Check], versions: Mapping[str, str], logs: Path
    ) -> Report:
        from ..doctor.versions import sglang_site
        from . import report
        from .differences import differences
        from .machine import device
        from .redact import redactor
        from .turns import Turns

        if known.missing:
            self._say("the functions that are not known are compared with the nearest release")
        unknown = differences(known, sglang_site(), self._plan.reference) if known.missing else []
        tried = _on_trial(known)
        found = Turns(self._plan, logs, self._trial(tried, logs), self._say).run()
        all_checks = found.checks()
        certificate = self._certify(known, found.features, all_checks) if known.missing else None
        result = Report(
            build=known.build.label,
            digest=known.build.digest,
            decision=tried.sentence,
            versions=versions,
            arguments=self._plan.arguments,
            checks=all_checks,
            doctor=doctor,
            differences=unknown,
            speeds=found.speeds,
            resources=found.resources,
            picture="",
            certified=isinstance(certificate, Path),
            conclusion=_conclusion(all_checks, known, certificate),
            seconds=time.monotonic() - self._began,
            device=device(self._plan.arguments, self._environ),
            variants=found.variants,
        )
        _show(all_checks)
        names = report.write(
            result, self._plan.output, redactor(self._plan.arguments, self._environ), found.timeline
        )
        self._say(f"report: {', '.join(map(str, names))}")
        print(f"\n{result.conclusion}", flush=True)
        return result

    def _trial(self, tried: Known, logs: Path) -> Path | None:
        """Folder with a certificate for these servers only."""
        if tried.certificate is None:
            return None
        folder = logs / "trial"
        certificates.write(tried.certificate, folder)
        return folder

    def _certify(self, known: Known, features: Sequence[str], found: Sequence[Check]) -> Path | str:
        """The certificate, or why there is none."""
        from .checks import may_be_certified

        settings = load_settings(self._environ)
        if any(check.verdict is Verdict.FAILED for check in found):
            withdrawn = certificates.withdraw(known, certificates.folder(settings))
            return "its certificate is withdrawn" if withdrawn else "it gets no certificate"
        if not may_be_certified(found):
            return "a check that matters was left out"
        if not features:
            return "the patched server did not say which features it uses"
        certificate = certificates.for_known(certificates.certified(known, settings), features)
        return certificates.write(certificate, certificates.folder(settings))

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:4.0f} s] {text}", flush=True)


def _on_trial(known: Known) -> Known:
    """With all that fits in force. Raises CertificateError where the core does not fit."""
    if not known.missing:
        return known
    return replace(known, certificate=certificates.for_known(known, _fitting(known), trial=True))


def _fitting(known: Known) -> list[str]:
    """Features whose patches fit at all; those that the server does not use need not."""
    found = [CORE]
    for feature in known.features[1:]:
        with suppress(CertificateError):
            certificates.for_known(known, [feature], trial=True)
            found.append(feature)
    return found


def _conclusion(found: Sequence[Check], known: Known, certificate: Path | str | None) -> str:
    failed = [check.name for check in found if check.verdict is Verdict.FAILED]
    if failed:
        so = f"; {certificate}" if isinstance(certificate, str) else ""
        return f"The two servers are not equal: {', '.join(failed)}{so}."
    if certificate is None:
        return f"Nothing differs. SGLang {known.build.label} is known, so it needs no certificate."
    if isinstance(certificate, str):
        return f"Nothing differs, but there is no certificate: {certificate}."
    return f"Nothing differs. SGLang {known.build.label} is certified: its servers are patched from now on."


def _show(found: Sequence[Check]) -> None:
    for check in found:
        print(f"  {check.verdict.value:<9}{check.name}: {check.text}", flush=True)
        for line in check.details:
            print(f"             {line}")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value
