"""The heads of a growth as they are drawn in a terminal, where layers grow alike and where they do not."""

from gdagrow_cli.head_map import draw_choices, draw_growth
from rich.console import Console
from rich.table import Table

from gdagrow.heads import HeadGrowth, Heads, Ratio, grow_heads


def chosen(*copies: tuple[int, ...], noise: int = 1) -> HeadGrowth:
    heads = Heads(len(copies), len(copies[0]), 1)
    return grow_heads(heads, signal=Ratio(sum(copies[0])), noise=noise, kv=1, copies=copies)


def lines(table: Table, width: int = 80) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return [" ".join(line.split()) for line in capture.get().splitlines()]


def test_layers_that_grow_alike_share_a_line() -> None:
    first, other = chosen((2, 1, 1), (1, 1, 2)), chosen((1, 2, 1), (1, 2, 1))
    assert lines(draw_choices([first, other, first, first, first, other])) == [
        "layers in each group of the source", "0, 2-4 S0 | S2", "1, 5 S1 | S1",
    ]  # fmt: skip


def test_heads_are_named_as_often_as_they_are_cloned_beyond_the_others() -> None:
    """Each old group once, however many copies it has."""
    for noise in (1, 3):
        growths = [chosen((3, 2, 5), (4, 4, 2), noise=noise), chosen((2, 4, 4), (2, 3, 5), noise=noise)]
        assert lines(draw_choices(growths))[1:] == ["0 S0 S2 S2 S2 | S0 S0 S1 S1", "1 S1 S1 S2 S2 | S1 S2 S2 S2"]


def test_groups_whose_heads_are_cloned_alike_say_so() -> None:
    assert lines(draw_choices([chosen((2, 2), (1, 3)), chosen((3, 1), (2, 2))]))[1:] == [
        "0 none | S1 S1",
        "1 S0 S0 | none",
    ]


def test_of_many_choices_the_first_and_the_last_are_shown() -> None:
    """32 layers of 5 groups, each with a choice of its own, and lines that are no wider than the terminal."""
    growths = [
        chosen(*[(1 + (layer >> group) % 2, 2 - (layer >> group) % 2) for group in range(5)]) for layer in range(32)
    ]
    drawn = lines(draw_choices(growths))
    assert len(drawn) == 1 + 16 + 1
    assert drawn[1] == "0 S1 | S1 | S1 | S1 | S1"
    assert drawn[-2:] == ["... 16 more choices", "31 S0 | S0 | S0 | S0 | S0"]
    assert max(map(len, lines(draw_choices(growths), width=20))) <= 20


def test_the_first_layer_is_drawn_with_its_own_copies() -> None:
    assert lines(draw_growth(chosen((1, 2, 1), (1, 1, 2)), 80))[1:] == [
        "0 0 S0 S1 S2 S1 N group 0", "1 S0 S1 S2 S2 N group 1",
    ]  # fmt: skip
