"""Recipes as data: fields, alternatives, parsing, and what the built-in ones promise."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from el_convert.errors import UnknownNameError
from el_convert.recipes import RECIPES, LinkOptions, Recipe, RecipeError, find_recipe

GROUPS = ("input", "weight", "link", "activation", "keep", "training")


def alternatives() -> list[tuple[str, Any]]:
    """Every (field, value) a recipe can take, floats by example."""
    found: list[tuple[str, Any]] = []
    for group in GROUPS:
        options = getattr(RECIPES["elastic-link"], group)
        for name, kind in get_type_hints(type(options)).items():
            values = (True, False) if kind is bool else get_args(kind) or (0.0, 0.5, 2.0)
            found += [(f"{group}.{name}", value) for value in values]
    return found


@pytest.mark.parametrize(("name", "value"), alternatives())
def test_every_alternative_is_reached_from_text(name: str, value: Any) -> None:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    assert RECIPES["plain"].with_options({name: text}).option(name) == value
    assert RECIPES["plain"].with_options({name: value}).option(name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("link.gamma_init", "much"),
        ("link.gamma_init", "nan"),
        ("link.gamma_init", True),
        ("link.gamma", "none"),
        ("link.enabled", "maybe"),
        ("link.enabled", 1),
        ("training.steps", True),
        ("training.steps", "3"),
        ("activation.slope", "inf"),
    ],
)
def test_wrong_values_are_refused(name: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=name):
        RECIPES["plain"].with_options({name: value})


def test_wrong_values_are_refused_on_construction() -> None:
    with pytest.raises(RecipeError, match=r"link\.gamma must be one of channel, scalar, fixed"):
        Recipe("mine", link=LinkOptions(gamma="none"))  # type: ignore[arg-type]


def test_unknown_fields_and_recipes_name_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean 'link\.gamma_init'"):
        RECIPES["plain"].with_options({"link.gama_init": "1"})
    with pytest.raises(UnknownNameError, match="did you mean 'elastic-link'"):
        find_recipe("elastic")
    with pytest.raises(UnknownNameError, match="the recipes are elastic-link, plain"):
        find_recipe("zzz")


@pytest.mark.parametrize("name", RECIPES)
def test_survives_json(name: str) -> None:
    recipe = RECIPES[name]
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert find_recipe(name) is recipe
    assert find_recipe(recipe) is recipe


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists, max_leaves=3))
def test_foreign_data_is_refused_or_harmless(value: Any) -> None:
    data = RECIPES["plain"].to_dict()
    data["link"]["gamma_init"] = value
    try:
        recipe = Recipe.from_dict(data)
    except RecipeError:
        return
    assert isinstance(recipe.link.gamma_init, (int, float))


def test_recipes_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECIPES["plain"].name = "other"  # type: ignore[misc]


def test_plain_differs_from_the_default_in_the_link_alone() -> None:
    plain, default = RECIPES["plain"].to_dict(), RECIPES["elastic-link"].to_dict()
    assert [group for group in GROUPS if plain[group] != default[group]] == ["link"]
    assert not RECIPES["plain"].link.enabled


def test_the_default_is_as_documented() -> None:
    recipe = RECIPES["elastic-link"]
    assert recipe.input.gradient == "approx"
    assert recipe.weight.scale == "mean"
    assert (recipe.link.place, recipe.link.gamma, recipe.link.gamma_init) == (
        "before-norm",
        "channel",
        3.0,
    )
    assert recipe.link.downsample == "max"
    assert (recipe.activation.replacement, recipe.activation.which) == ("prelu", "relu")
    assert recipe.activation.slope == 1


def test_reactnet_has_its_parts() -> None:
    recipe = RECIPES["reactnet"]
    assert recipe.input.threshold == "learned"
    assert recipe.activation.replacement == "rprelu"
    assert recipe.training.loss == "distribution"
    assert recipe.keep.shortcut
    elastic = RECIPES["elastic-reactnet"]
    assert elastic.norm.zero_weights == "one"
    shared = {"link": recipe.link, "norm": recipe.norm, "name": "", "summary": ""}
    assert dataclasses.replace(elastic, **shared) == (
        dataclasses.replace(recipe, name="", summary="")
    )
    assert elastic.link == LinkOptions()
