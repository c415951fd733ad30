import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.cost import Budget, Cost, Limit, format_cost
from secateur.errors import BudgetError

ORIGINAL = Cost(macs=1000, params=300, size_bytes=1300, latency_s=0.006)


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("macs=50%", {"macs": 500.0}),
        ("macs<=50%", {"macs": 500.0}),
        ("MACs = 50 %", {"macs": 500.0}),
        ("macs=62.5M, params<=200k", {"macs": 62_500_000.0, "params": 200_000.0}),
        ("params=1.5g", {"params": 1.5e9}),
        ("macs=1_000", {"macs": 1000.0}),
        ("macs=2e7", {"macs": 2e7}),
        ("macs=.5k", {"macs": 500.0}),
        ("params=30,macs=10%", {"macs": 100.0, "params": 30.0}),
        ("latency=4ms", {"latency_s": 0.004}),
        ("latency<=1.5 s", {"latency_s": 1.5}),
        ("latency=750us", {"latency_s": 0.00075}),
        ("latency=750µs", {"latency_s": 0.00075}),
        ("latency=25%", {"latency_s": 0.0015}),
        ("size=2MB", {"size_bytes": 2e6}),
        ("size<=1.5MiB", {"size_bytes": 1.5 * 2**20}),
        ("size=900b", {"size_bytes": 900.0}),
        ("macs=50%, latency=60%, size<=2MB", {"macs": 500.0, "size_bytes": 2e6, "latency_s": 0.0036}),
    ],
)
def test_budgets_are_read(text, limits):
    assert Budget.parse(text).limits(ORIGINAL) == pytest.approx(limits, rel=1e-15)
    assert Budget.parse(text).fields == tuple(limits)


def test_values_may_be_numbers_or_text():
    assert Budget(macs=2e7) == Budget(macs="20M") == Budget.parse("macs=20000k")
    assert Budget(macs=50) != Budget(macs="50%")
    assert hash(Budget(macs="50%")) == hash(Budget.parse("macs<=50.0 %"))


def test_parts_are_limits():
    assert Budget(macs="50%", params=40).parts == (Limit("macs", 50.0, True), Limit("params", 40.0, False))


def test_a_percentage_is_exact():
    assert Budget(macs="70%").limits(Cost(10, 1)) == {"macs": 7.0}


def test_allows_up_to_and_with_the_bound():
    budget = Budget(macs="50%", params=100)
    assert budget.allows(Cost(500, 100), ORIGINAL)
    assert not budget.allows(Cost(501, 100), ORIGINAL)
    assert not budget.allows(Cost(500, 101), ORIGINAL)


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (Budget(macs="50%"), "macs<=50%"),
        (Budget(macs=2e7, params="200k"), "macs<=20M, params<=200k"),
        (Budget(macs=123_456_789), "macs<=123456789"),
        (Budget(params="33.3%"), "params<=33.3%"),
        (Budget(params=999), "params<=999"),
        (Budget(latency=0.004), "latency<=4ms"),
        (Budget(latency="1500us"), "latency<=1.5ms"),
        (Budget(latency=2, macs="50%"), "macs<=50%, latency<=2s"),
        (Budget(latency="60%"), "latency<=60%"),
        (Budget(latency=0.123456789012), "latency<=0.123456789012s"),
        (Budget(size=2e6), "size<=2MB"),
        (Budget(size="2KiB"), "size<=2.048kB"),
        (Budget(size=1234567891), "size<=1234567891B"),
    ],
)
def test_budgets_are_shown_as_they_would_be_written(budget, text):
    assert str(budget) == text
    assert Budget.parse(str(budget)) == budget


@settings(deadline=None, derandomize=True)
@given(st.floats(1e-6, 100), st.floats(1, 1e15), st.floats(1e-9, 1e3))
def test_text_reads_back_to_the_same_budget(percent, count, seconds):
    budget = Budget(macs=f"{percent!r}%", params=count, size=count, latency=seconds)
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be limits separated by commas; got ''"),
        ("50%", "must be limits separated by commas; got '50%'"),
        ("macs", "must be limits separated by commas; got 'macs'"),
        ("macs=50%,", "separated by commas; got '' in 'macs=50%,'"),
        ("macs=1,000", "separated by commas; got '000'"),
        ("macs=50% params=3k", "`macs` must be a number with an optional unit"),
        ("macs>=50%", "must use = or <=, both an upper bound; got '>='"),
        ("latency=4", "`latency` must have the unit %, s, ms or us; got '' in '4'"),
        ("latency=soon", "`latency` must be a number with the unit % or s, ms or us; got 'soon'"),
        ("latency=0ms", "`latency` must be above 0; got '0ms'"),
        ("latency=120%", "`latency` must be above 0% and at most 100%"),
        ("size=1M", "`size` must have the unit %, B, kB, MB, GB, KiB, MiB or GiB; got 'm'"),
        ("size=0.1B", "`size` must be at least 1 when it is a count"),
        ("activation_bytes=1M", "got the unknown field 'activation_bytes'"),
        ("flops=50%", "got the unknown field 'flops'"),
        ("macs=50%, macs=40%", "must limit macs once"),
        ("macs=", "`macs` must be a number"),
        ("macs=half", "`macs` must be a number"),
        ("macs=nan", "`macs` must be a number"),
        ("macs=1e999", "`macs` must be a number"),
        ("macs=inf", "`macs` must be a number"),
        ("macs=-5%", "`macs` must be a number"),
        ("macs=0%", "`macs` must be above 0% and at most 100% of the original"),
        ("macs=150%", "at most 100% of the original; got '150%'"),
        ("macs=5MB", "must have the unit %, k, M or G, or none; got 'mb'"),
        ("macs=0", "`macs` must be at least 1 when it is a count; got '0'\\.$"),
        ("macs=0.5", "at least 1 when it is a count; got '0.5'. Write '50%' for a fraction"),
    ],
)
def test_unreadable_budgets_are_refused(text, message):
    with pytest.raises(BudgetError, match=message):
        Budget.parse(text)


@pytest.mark.parametrize("value", [True, float("nan"), float("inf"), -3, [50], b"50%"])
def test_values_that_are_no_amount_are_refused(value):
    with pytest.raises(BudgetError, match="`macs` must be a number with an optional unit"):
        Budget(macs=value)


def test_an_empty_budget_is_refused():
    with pytest.raises(
        BudgetError, match=r"must limit macs or params or nonzero or size or latency; got no limit\. Write, for example"
    ):
        Budget()


def test_a_bound_on_nonzero_parameters_is_for_weight_pruning_alone():
    budget, original = Budget.parse("nonzero=20%, macs=50%"), Cost(macs=1000, params=300)
    assert budget == Budget(macs="50%", nonzero="20%")
    assert str(budget) == "macs<=50%, nonzero<=20%"
    assert budget.limits(original) == {"macs": 500.0}
    assert budget.allows(Cost(macs=500, params=300), original)
    assert budget.nonzero_limit(original) == 60.0
    assert Budget(nonzero="1k").nonzero_limit(original) == 1000.0
    assert Budget(macs="50%").nonzero_limit(original) is None
    with pytest.raises(BudgetError, match="`nonzero` must be above 0%"):
        Budget(nonzero="0%")


def test_a_bound_on_what_is_not_known_is_an_error_that_says_who_knows():
    plain = Cost(macs=1000, params=300)
    with pytest.raises(BudgetError, match=r"a limit of latency, and a cost without latency_s\. .*fit_latency"):
        Budget(latency="50%").limits(plain)
    assert Budget(latency="4ms").limits(plain) == {"latency_s": 0.004}
    with pytest.raises(BudgetError, match="a limit of size, and a cost without size_bytes"):
        Budget(size="4kB").allows(plain, plain)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("latency_s", 0.0042, "4.2 ms"),
        ("latency_s", 2.5, "2.5 s"),
        ("latency_s", 0.00099, "990 us"),
        ("latency_s", 0.0009999, "1 ms"),
        ("latency_s", 0.0, "0 us"),
        ("size_bytes", 1_250_000, "1.25 MB"),
        ("size_bytes", 12, "12 B"),
        ("macs", 40_900_000, "40.9 M"),
    ],
)
def test_costs_are_shown_with_their_units(field, value, text):
    assert format_cost(field, value) == text
