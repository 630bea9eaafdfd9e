import pytest

from soteacher.errors import InputError
from soteacher.method_pages import describe_method, markdown
from soteacher.objectives import methods, objective_config


@pytest.mark.parametrize("name", methods())
def test_every_method_has_a_whole_page(name: str) -> None:
    page, method = describe_method(name), methods()[name]
    assert page.startswith(f"# {name}\n\n{method.title}.\n")
    assert method.source in page
    for term, settings in method.terms.items():
        assert f"\n## {term}\n" in page
        for field in objective_config(term)(**settings).model_dump():
            assert f"| `{field}`" in page
    for rest in (":math:", ".. math::", "``", ":class:", ":func:", "\n\n\n\n"):
        assert rest not in page.replace("```", "")


def test_the_loss_shows_weights_and_ramps() -> None:
    assert "Loss = 1 `cross_entropy` + 1e-05 `lipschitz` + 1 `consistency` (linear ramp)" in describe_method(
        "soteacher"
    )
    assert "Loss = 0.5 `cross_entropy` + 0.5 `kd`" in describe_method("kd")


def test_a_setting_of_the_method_stands_beside_its_default() -> None:
    row = next(line for line in describe_method("kd").splitlines() if line.startswith("| `temperature`"))
    assert [cell.strip() for cell in row.split("|")][2:4] == ["4.0", "4.0"]


def test_an_unknown_method_offers_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown method 'sotecher'; did you mean soteacher"):
        describe_method("sotecher")


def test_markdown_turns_mathematics_and_roles() -> None:
    text = "Mean of :math:`n + 1`.\n\n.. math:: a / b\n\n.. math::\n    c \\\\\n    d\n\nSee :func:`~one.three`, ``x``."
    assert markdown(text).split("\n\n") == ["Mean of $n + 1$.", "$$ a / b $$", "$$ c \\\\ d $$", "See `three`, `x`."]
