"""The limit is never passed, whatever runs at once; what is unknown counts at its worst."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdlab.errors import BudgetSpent, InvalidValue, OpdlabError
from opdlab.teachers.budget import TEMPLATE, Budget, Usage, worst

USED = st.builds(Usage, st.integers(0, 30), st.integers(0, 30), st.just(1))


@given(st.lists(USED, max_size=40), st.integers(0, 400), st.integers(0, 15))
def test_requests_in_flight_never_pass_a_limit(used, tokens, requests):
    """Every request holds its worst case while it runs, so at no moment can spent and held pass the
    limit.
    """
    budget, stopped = Budget(tokens=tokens, requests=requests), []

    def request(usage: Usage) -> None:
        try:
            with budget.hold(Usage(30, 30, 1)) as hold:
                together = budget.spent + budget._held
                assert together.tokens <= tokens
                assert together.requests <= requests
                hold.used = usage
        except BudgetSpent as error:
            stopped.append(error)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(request, usage) for usage in used]:
            future.result(timeout=200)
    assert budget._held == Usage()
    assert budget.spent.requests == len(used) - len(stopped)
    if not stopped:
        assert budget.spent == sum(used, Usage())


def test_it_waits_for_what_is_in_flight_before_it_gives_up():
    budget, inside, go = Budget(tokens=100), threading.Event(), threading.Event()

    def first() -> None:
        with budget.hold(Usage(60, 30, 1)) as hold:
            inside.set()
            assert go.wait(20)
            hold.used = Usage(5, 5, 1)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first)
        assert inside.wait(20)
        two = pool.submit(lambda: budget.hold(Usage(60, 30, 1)).__exit__())
        assert not two.done()  # 90 are held, 90 more would be 180
        go.set()
        one.result(20)
        two.result(20)
    assert budget.spent == Usage(65, 35, 2)  # the second said nothing of what it used
    with pytest.raises(
        BudgetSpent,
        match=(
            r"may use up to 1 tokens, and of the budget of 100 tokens only 0 tokens are left\."
            r" Nothing is lost"
        ),
    ):
        budget.hold(Usage(1, 0, 1))


def test_money_and_requests_are_limits_too():
    budget = Budget(cost=1.0, prices=(2.0, 10.0))
    assert budget.price(Usage(250_000, 50_000)) == pytest.approx(1.0)
    budget.hold(Usage(100_000, 50_000, 1)).__exit__()
    with pytest.raises(
        BudgetSpent, match=r"of the budget of 1\.0 of money only 0\.3 of money are left"
    ):
        budget.hold(Usage(0, 31_000, 1))
    budget.hold(Usage(0, 30_000, 1))
    with pytest.raises(BudgetSpent, match="of the budget of 0 requests only 0 requests are left"):
        Budget(requests=0).hold(Usage(requests=1))


def test_an_error_inside_counts_the_worst_case():
    budget = Budget()
    with pytest.raises(ZeroDivisionError), budget.hold(Usage(7, 8, 1)):
        raise ZeroDivisionError
    assert budget.spent == Usage(7, 8, 1)


def test_bad_budgets_are_errors():
    with pytest.raises(OpdlabError, match="a limit on cost needs prices"):
        Budget(cost=3.0)
    wrong = {
        "tokens": ["5", math.nan, -1, 1.5, True],
        "requests": [-1, "1"],
        "cost": [math.inf, -0.5],
        "prices": [(1,), 3, (1, -1)],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(InvalidValue, match=rf"Budget got {name}="):
                Budget(**{name: value})
    with pytest.raises(InvalidValue, match=r"Usage got completion=-1"):
        Usage(1, -1)


@given(st.text(max_size=200), st.integers(1, 9), st.integers(1, 99))
def test_the_worst_case_of_a_text_is_a_token_a_byte(text, n, limit):
    assert worst(text, n, limit) == Usage(len(text.encode()) + TEMPLATE, n * limit, 1)
