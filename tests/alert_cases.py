"""The cases of the alerts: what Prometheus is given, in promtool's notation, and which alerts then fire.

``"0x5 1x9"`` is 0 at the minutes 0 to 5, then 1 at the minutes 6 to 15; ``"0+2x9"`` grows by 2 a minute. Time
begins at 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["fires", "silent", "resolves"]
Series = dict[str, str]

WINDOWS: Final = ("1h", "6h", "1d", "3d")
UNSEEN: Final = ("5m", "15m")
"""Of the exporter: for how long it was not seen."""
BURN: Final = "DualWriteErrorBudgetBurn"


@dataclass(frozen=True)
class Firing:
    """An alert that fires: the labels of its series, and how its description shows the value."""

    labels: Mapping[str, str]
    value: str = ""
    window: str | None = None


@dataclass(frozen=True)
class Case:
    """``looks``: what fires at a time. ``window`` tells the alerts of one name apart; ``minutes`` is the
    distance of two samples and of two evaluations.
    """

    alert: str
    kind: Kind
    told: str
    series: Series
    looks: Mapping[str, tuple[Firing, ...]]
    window: str | None = None
    minutes: int = 1


def exporter(name: str, values: str, **labels: str) -> Series:
    """A series as the exporter serves it."""
    return {selector(name, {**EXPORTER, **labels}): values}


def shop(name: str, values: str, instance: str = "a", **labels: str) -> Series:
    """A series as one process of the application serves it."""
    return {selector(name, {**SHOP, "instance": instance, **labels}): values}


def selector(name: str, labels: Mapping[str, str]) -> str:
    inner = ", ".join(f'{label}="{value}"' for label, value in labels.items())
    return f"walletmigrate_{name}{{{inner}}}"


EXPORTER: Final = {"job": "walletmigrate-exporter", "instance": "db"}
SHOP: Final = {"job": "shop"}


def plain(
    alert: str,
    firing: Firing,
    name: str,
    *,
    fires: tuple[str, str, str],
    silent: tuple[str, str, str],
    resolves: tuple[str, str, str, str],
    **labels: str,
) -> tuple[Case, ...]:
    """The three cases of an alert on one series of the exporter: (what it is, values, when it is looked at …)."""

    def series(values: str) -> Series:
        return exporter(name, values, **labels)

    return (
        Case(alert, "fires", fires[0], series(fires[1]), {fires[2]: (firing,)}),
        Case(alert, "silent", silent[0], series(silent[1]), {silent[2]: ()}),
        Case(alert, "resolves", resolves[0], series(resolves[1]), {resolves[2]: (firing,), resolves[3]: ()}),
    )


def writes(ok: str, failed: str, **others: str) -> Series:
    """Dual-writes of one process by outcome."""
    outcomes = {"ok": ok, "ledger_failed": failed, **others}
    made: dict[str, str] = {}
    for outcome, values in outcomes.items():
        made |= shop("dual_write_total", values, operation="credit", outcome=outcome)
    return made


def burning(*windows: str, value: str = "") -> tuple[Firing, ...]:
    return tuple(Firing(SHOP, value, window) for window in windows)


def burns(window: str, ok: int, failed: int, value: str, all_windows: tuple[str, ...]) -> Case:
    told = f"{value} of the postings fail"
    series = writes(f"0+{ok}x90", f"0+{failed}x90", skipped="0+900x90", refused="0+900x90")
    return Case(BURN, "fires", told, series, {"90m": burning(*all_windows, value=value)}, window)


def budget() -> tuple[Case, ...]:
    """The error budget, whose four windows are four alerts of one name."""
    ends = writes("0+980x60 58820+1000x400", "0+20x60 1200x400")
    gone = {
        "60m": burning(*WINDOWS),
        "70m": burning("6h", "1d", "3d"),
        "100m": burning("1d", "3d"),
        "190m": burning("3d"),
        "440m": (),
    }
    flare = writes("0+1000x170 170840+840x4 175200+1000x10", "0x170 160+160x4 800x10")
    wanted = writes("0+1000x90", "0x90", skipped="0+900x90", refused="0+900x90")
    lone = writes("0x90", "0x59 1x30")
    # Nothing is known of the hours before: what little there is must not be taken for their rate.
    young, gap = writes("0+1x3 3x86", "0x3 1x86"), writes("0 _x30 1+1x3 4x56", "0 _x33 1x56")
    none = writes("0x90", "0+100x90", skipped="0+900x90")
    return (
        Case(BURN, "fires", "the ledger breaks every payment", none, {"90m": burning(*WINDOWS, value="100%")}, "1h"),
        burns("1h", 980, 20, "2%", WINDOWS),
        burns("6h", 990, 10, "1%", ("6h", "1d", "3d")),
        burns("1d", 995, 5, "0.5%", ("1d", "3d")),
        burns("3d", 998, 2, "0.2%", ("3d",)),
        *(Case(BURN, "silent", "postings skipped and refused", wanted, {"90m": ()}, window) for window in WINDOWS),
        *(Case(BURN, "silent", "one failure without traffic", lone, {"62m": ()}, window) for window in WINDOWS),
        *(
            Case(BURN, "silent", what, four, {"6m": (), "25m": (), "37m": (), "60m": ()}, window)
            for what, four in (("four postings of a new series", young), ("four postings behind a gap", gap))
            for window in WINDOWS
        ),
        *(
            Case(BURN, "silent", "a flare of five minutes", flare, {"177m": burning("1d", "3d")}, window)
            for window in ("1h", "6h")
        ),
        *(Case(BURN, "resolves", "the failures end", ends, gone, window) for window in WINDOWS),
    )


def reads() -> tuple[Case, ...]:
    alert, firing = "ReadMismatch", Firing(SHOP, "3")

    def compared(outcome: str, values: str, instance: str = "a") -> Series:
        return shop("read_compare_total", values, instance, outcome=outcome)

    two = compared("mismatch", "0x10 1x40") | compared("mismatch", "0x10 2x40", "b")
    others = compared("match", "0+5x40") | compared("stale", "0+5x40") | compared("mismatch", "7x40")
    return (
        Case(alert, "fires", "two processes see mismatches", two, {"11m": (firing,)}),
        Case(alert, "silent", "reads match, are stale, or differed long ago", others, {"30m": ()}),
        Case(alert, "resolves", "a quarter of an hour without", two, {"25m": (firing,), "27m": ()}),
    )


def bypasses() -> tuple[Case, ...]:
    alert, name = "BypassWrites", "bypass_writes_total"

    def past(treatment: str, values: str) -> Series:
        return exporter(name, values, treatment=treatment)

    def firing(treatment: str) -> Firing:
        return Firing({"job": EXPORTER["job"], "treatment": treatment}, "2")

    stale = past("turned_stale", "0x10 2x40")
    rejected = past("rejected", "0x10 2x40")
    quiet = past("absent", "0+9x40") | past("mirrored", "0+9x40") | past("closed", "0+1x40") | past("stale", "5x40")
    both = {"11m": (firing("rejected"), firing("turned_stale"))}
    return (
        Case(alert, "fires", "writes turn accounts stale, or are rejected", stale | rejected, both),
        Case(alert, "silent", "absent and mirrored accounts, and deleted rows", quiet, {"30m": ()}),
        Case(alert, "resolves", "a quarter of an hour without", stale, {"25m": (firing("turned_stale"),), "27m": ()}),
    )


def verifications() -> tuple[Case, ...]:
    alert, name = "VerificationStale", "verification_last_success_timestamp_seconds"

    def standing(phase: str, values: str) -> Series:
        phases = ("legacy", "dual_write", "read_ledger", "retired")
        made = exporter(name, values)
        for one in phases:
            made |= exporter("phase", f"{int(one == phase)}x60", phase=one)
        return made

    def case(kind: Kind, told: str, series: Series, looks: Mapping[str, tuple[Firing, ...]]) -> Case:
        return Case(alert, kind, told, series, looks, minutes=30)

    firing = (Firing(EXPORTER, "1d 3h 0m 0s"),)
    return (
        case("fires", "27 hours ago", standing("dual_write", "3600x60"), {"28h": firing}),
        case("fires", "never, and read from the ledger", standing("read_ledger", "0x60"), {"27h": firing}),
        case(
            "fires",
            "a later one was not clean",
            standing("dual_write", "3600x2 1x60"),
            {"27h": (Firing(EXPORTER, "1d 2h 59m 59s"),)},
        ),
        case("silent", "25 hours ago", standing("dual_write", "3600x60"), {"26h": ()}),
        case("silent", "never, and nothing is read", standing("dual_write", "0x60"), {"30h": ()}),
        case("silent", "before the migration", standing("legacy", "3600x60"), {"30h": ()}),
        case("silent", "after the migration", standing("retired", "3600x60"), {"30h": ()}),
        case("resolves", "verified", standing("read_ledger", "0x54 99000x9"), {"27h": firing, "28h": ()}),
    )


def stalls() -> tuple[Case, ...]:
    alert, firing = "BackfillStalled", (Firing({**EXPORTER, "kind": "backfill", "mapping": "users"}, "70"),)

    def job(items: str, remaining: str = "70x90", paused: str = "0x90", mapping: str = "users") -> Series:
        return {
            **exporter("job_items", items, kind="backfill", mapping=mapping),
            **exporter("job_remaining", remaining, kind="backfill", mapping=mapping),
            **exporter("job_paused", paused, kind="backfill", mapping=mapping),
        }

    hangs = "0+10x10 100x80"
    unknown = (Firing({**EXPORTER, "kind": "backfill", "mapping": "users"}, "NaN"),)
    other = job("0+1x90", mapping="shops")
    return (
        Case(alert, "fires", "no item for long", job(hangs), {"41m": firing}),
        Case(alert, "fires", "it never counted its items", job(hangs, "NaN" + " NaN" * 90), {"41m": unknown}),
        Case(alert, "fires", "no item for long, while another mapping's moves", job(hangs) | other, {"41m": firing}),
        Case(alert, "silent", "no item for a while", job(hangs), {"38m": ()}),
        Case(alert, "silent", "it moves", job("0+1x90"), {"60m": ()}),
        Case(alert, "silent", "paused, or held", job(hangs, paused="0x12 1x80"), {"60m": ()}),
        Case(alert, "fires", "its process died while it was held", job(hangs, paused="0x12 1x6 0x80"), {"41m": firing}),
        Case(alert, "silent", "done", job(hangs, "0x90"), {"60m": ()}),
        Case(alert, "resolves", "it moves again", job("0+10x10 100x40 110+10x20"), {"45m": firing, "55m": ()}),
    )


def latency() -> tuple[Case, ...]:
    alert, firing = "LedgerLatencyHigh", (Firing({**SHOP, "mode": "dual_write"}, "475ms"),)

    def calls(fast: str, all_: str, mode: str = "dual_write") -> Series:
        made: dict[str, str] = {}
        for bound, values in (("0.1", fast), ("0.25", fast), ("0.5", all_), ("+Inf", all_)):
            made |= shop("dual_write_duration_seconds_bucket", values, operation="credit", mode=mode, le=bound)
        made |= shop("dual_write_duration_seconds_count", all_, operation="credit", mode=mode)
        return made

    slow = calls("0+90x60", "0+100x60")
    mended = calls("0+90x30 2800+100x30", "0+100x60")
    return (
        Case(alert, "fires", "a tenth takes half a second", slow, {"30m": firing}),
        Case(alert, "silent", "slow for less than ten minutes", slow, {"9m": ()}),
        Case(alert, "silent", "slow where the ledger has no part", calls("0x60", "0+100x60", "legacy"), {"30m": ()}),
        Case(alert, "silent", "a few slow calls", calls("0x60", "0+5x60"), {"30m": ()}),
        Case(alert, "resolves", "fast again", mended, {"30m": firing, "42m": ()}),
    )


def ages() -> tuple[Case, ...]:
    alert, firing = "FlagsStale", (Firing(SHOP, "6m 40s"),)

    def age(values: str) -> Series:
        fresh = shop("flag_age_seconds", "5x60", "b", flag="wallet.dualWrite")
        return {**fresh, **shop("flag_age_seconds", values, flag="wallet.dualWrite")}

    return (
        Case(alert, "fires", "one process's document is old", age("5x5 400x20"), {"12m": firing}),
        Case(alert, "silent", "an old document for a moment", age("5x5 400x3 5x20"), {"9m": (), "12m": ()}),
        Case(alert, "silent", "a poll failed", age("290x20"), {"15m": ()}),
        Case(alert, "resolves", "read again", age("400x10 5x10"), {"10m": firing, "11m": ()}),
    )


def looks(told: str, scraped: str, instance: str = "db") -> Series:
    """What one exporter tells of its looks, and whether it answered Prometheus."""
    target = {**EXPORTER, "instance": instance}
    return {
        selector("exporter_up", target): told,
        f'up{{job="{target["job"]}", instance="{instance}"}}': scraped,
        'up{job="shop", instance="a"}': "1x60",
    }


def unseen(*windows: str, here: bool = True) -> tuple[Firing, ...]:
    return tuple(Firing(EXPORTER if here else {}, window=window) for window in windows)


HALF: Final = " ".join(["1 0"] * 30)
FIFTHS: Final = " ".join(["1 1 0 1 0"] * 12)
GAPS: Final = " ".join(["1 stale"] * 30)
NOBODY: Final = {'up{job="shop", instance="a"}': "1x60"}


def looking() -> tuple[Case, ...]:
    """The exporter itself: soon read by somebody."""
    alert, fires = "ExporterDown", unseen("5m")
    replaced = looks("1x5 0x2 stale", "1x5 0x2 stale") | looks("_x10 1x50", "_x10 1x50", "new")
    cases: tuple[tuple[Kind, str, Series, dict[str, tuple[Firing, ...]]], ...] = (
        ("fires", "no database", looks("1x5 0x20", "1x60"), {"12m": fires}),
        ("fires", "no answer", looks("1x5 stale", "1x5 0x20"), {"12m": fires}),
        ("fires", "no target", NOBODY, {"6m": unseen("5m", here=False)}),
        ("fires", "each other look fails", looks(HALF, "1x60"), {"15m": fires, "30m": fires}),
        ("fires", "two looks of five fail", looks(FIFTHS, "1x60"), {"30m": fires}),
        ("fires", "each other scrape times out", looks(GAPS, HALF), {"30m": fires}),
        ("silent", "all well", looks("1x60", "1x60"), {"30m": ()}),
        ("silent", "a restart", looks("1x5 0x2 1x50", "1x60"), {"8m": (), "12m": ()}),
        ("silent", "the target was replaced", replaced, {"12m": (), "16m": (), "20m": ()}),
        ("resolves", "back", looks("0x10 1x20", "1x60"), {"10m": fires, "19m": ()}),
        ("resolves", "a target", looks("_x10 1x9", "_x10 1x9"), {"9m": unseen("5m", here=False), "12m": ()}),
    )
    return tuple(Case(alert, kind, told, series, when, "5m") for kind, told, series, when in cases)


def blind() -> tuple[Case, ...]:
    """The exporter itself: it wakes somebody."""
    alert, both = "ExporterDown", unseen("5m", "15m")
    rare = " ".join(["0 0 0 0 1"] * 12)
    cases: tuple[tuple[Kind, str, Series, dict[str, tuple[Firing, ...]]], ...] = (
        ("fires", "no database", looks("1x10 0x40", "1x60"), {"32m": both}),
        ("fires", "no answer", looks("1x10 stale", "1x10 0x40"), {"32m": both}),
        ("fires", "no target", NOBODY, {"16m": unseen("5m", "15m", here=False)}),
        ("fires", "one look of five succeeds", looks(rare, "1x60"), {"30m": both}),
        ("silent", "not yet for long", looks("1x10 0x40", "1x60"), {"24m": unseen("5m")}),
        ("silent", "two looks of five fail", looks(FIFTHS, "1x60"), {"50m": unseen("5m")}),
        (
            "silent",
            "it came back in time",
            looks("0x10 1x40", "1x60"),
            {"14m": unseen("5m"), "16m": unseen("5m"), "25m": ()},
        ),
        ("resolves", "back", looks("0x30 1x29", "1x60"), {"30m": both, "34m": unseen("5m"), "40m": ()}),
    )
    return tuple(Case(alert, kind, told, series, when, "15m") for kind, told, series, when in cases)


EUR: Final = {**EXPORTER, "currency": "EUR"}

CASES: Final[tuple[Case, ...]] = (
    *plain(
        "LedgerImbalance",
        Firing(EUR, "-0.01"),
        "ledger_imbalance",
        fires=("a cent is gone", "0x5 -0.01x5", "6m"),
        silent=("it balances", "0x20", "20m"),
        resolves=("mended", "-0.01x5 0x5", "5m", "6m"),
        currency="EUR",
    ),
    *plain(
        "BalanceDrift",
        Firing(EUR, "2"),
        "drift_accounts",
        fires=("two accounts differ", "0x5 2x5", "6m"),
        silent=("none does", "0x20", "20m"),
        resolves=("the next verification is clean", "2x5 0x5", "5m", "6m"),
        currency="EUR",
    ),
    Case(
        "BalanceDrift",
        "resolves",
        "back in legacy, where no verification comes any more",
        exporter("drift_accounts", "2x20", currency="EUR")
        | exporter("phase", "0x9 1x11", phase="legacy")
        | exporter("phase", "1x9 0x11", phase="dual_write"),
        {"5m": (Firing(EUR, "2"),), "10m": ()},
    ),
    *budget(),
    *reads(),
    *bypasses(),
    *verifications(),
    *stalls(),
    *plain(
        "JobFailed",
        Firing({**EXPORTER, "kind": "freeze", "mapping": "users"}, "2"),
        "job_failed",
        fires=("two items failed", "0x5 2x5", "6m"),
        silent=("none did", "0x20", "20m"),
        resolves=("the next run is whole", "2x5 0x5", "5m", "6m"),
        kind="freeze",
        mapping="users",
    ),
    *latency(),
    *ages(),
    *plain(
        "FlagDisagreement",
        Firing(EXPORTER, "2"),
        "flag_documents",
        fires=("two documents for five minutes", "1x5 2x20", "11m"),
        silent=("a change of flags on its way", "1x5 2x3 1x20", "9m"),
        resolves=("one again", "2x10 1x5", "10m", "11m"),
    ),
    *plain(
        "LineStopped",
        Firing(EXPORTER),
        "line_stopped",
        fires=("stopped for five minutes", "0x5 1x20", "11m"),
        silent=("stopped and resumed", "0x5 1x3 0x20", "9m"),
        resolves=("resumed", "1x10 0x5", "10m", "11m"),
    ),
    *looking(),
    *blind(),
)
