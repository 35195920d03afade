"""Recipes: named sets of flag values, under the flags of the command line."""

import argparse

import pytest

import main
import run_with_submitit
from util.recipes import RECIPES, parse_args


def read(text):
    return parse_args(argparse.ArgumentParser(parents=[main.get_args_parser()]), text.split())


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_gives_flags_that_exist_and_can_be_trained_with(name):
    args = read(f"--recipe {name}")
    assert {flag: getattr(args, flag) for flag in RECIPES[name]} == RECIPES[name]
    for action in main.get_args_parser()._actions:
        value = RECIPES[name].get(action.dest)
        assert value is None or action.choices is None or value in action.choices, action.dest
        assert value is None or action.type is None or isinstance(value, action.type), action.dest
    main.check_flags(args)


def test_recipe_gives_way_to_flags_of_the_command_line():
    args = read("--epochs 7 --recipe demo --batch_size 3")
    assert (args.epochs, args.batch_size, args.num_queries) == (7, 3, RECIPES["demo"]["num_queries"])


def test_command_line_without_a_recipe_has_the_published_defaults():
    read("--recipe demo")
    assert vars(read("")) == {**vars(main.get_args_parser().parse_args([])), "given_flags": []}


def test_command_line_names_the_flags_it_gives_even_where_they_are_the_defaults():
    args = read("--recipe demo --lr_backbone 0 --nheads 8 --allow large_images")
    assert args.given_flags == ["lr_backbone", "nheads", "allow", "recipe"]


def test_recipe_that_does_not_exist_is_refused_with_those_that_do(capsys):
    with pytest.raises(SystemExit):
        read("--recipe none")
    assert "demo" in capsys.readouterr().err


def test_recipe_is_known_to_a_job_too():
    assert run_with_submitit.parse_args(["--recipe", "demo"]).num_queries == RECIPES["demo"]["num_queries"]
