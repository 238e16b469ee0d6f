from __future__ import annotations

import pytest

from alignkit.errors import ConfigError
from alignkit.records import Example
from alignkit_rewards.attribute_binding import AttributeBinding
from alignkit_rewards.phrases import Phrase, find_phrases, phrases

QUESTIONS = {
    "a red circle": ["is there a circle?", "is the circle red?"],
    "a red circle left of a blue square": [
        "is there a circle?", "is the circle red?", "is there a square?", "is the square blue?",
    ],
    "a small white heart, an orange square and a black triangle": [
        "is there a heart?", "is the heart small?", "is the heart white?",
        "is there a square?", "is the square orange?", "is there a triangle?", "is the triangle black?",
    ],
    "a wooden chair and a green glass bottle": [
        "is there a chair?", "is the chair made of wood?",
        "is there a bottle?", "is the bottle green?", "is the bottle made of glass?",
    ],
    "a large purple ring above a star": [
        "is there a ring?", "is the ring large?", "is the ring purple?", "is there a star?",
    ],
    "two red apples and a round table": [
        "are there apples?", "are the apples red?", "is there a table?", "is the table round?",
    ],
    "two white sheep": ["are there sheep?", "are the sheep white?"],
    "wooden pencils and a leather shoes": [
        "are there pencils?", "are the pencils made of wood?", "are there shoes?", "are the shoes made of leather?",
    ],
    "three old men in a yellow boat": [
        "are there men?", "are the men old?", "is there a boat?", "is the boat yellow?",
    ],
    "a red-haired girl with a one-eyed green monster": [
        "is there a girl?", "is the girl red-haired?",
        "is there a monster?", "is the monster one-eyed?", "is the monster green?",
    ],
    "a car painted red beside a painted chair": [
        "is there a car?", "is the car painted red?", "is there a chair?",
    ],
    "a dog and a painted red, white and blue fence": [
        "is there a dog?", "is there a fence?", "is the fence red?", "is the fence white?", "is the fence blue?",
    ],
    "a cat next to a painted orange": ["is there a cat?", "is there an orange?"],
    "a dog next to a painted red and a green chair": ["is there a dog?", "is there a chair?", "is the chair green?"],
    "a newly painted red, shiny car": ["is there a car?", "is the car red?", "is the car shiny?"],
    "the door is painted green": ["is there a door?", "is the door green?"],
    "a wooden dog-sled and a red sofa-bed": [
        "is there a dog-sled?", "is the dog-sled made of wood?", "is there a sofa-bed?", "is the sofa-bed red?",
    ],
    "a 50s-colored car": ["is there a car?", "is the car 50s-colored?"],
    "a 3d render of a golden dragon": ["is there a dragon?", "is the dragon golden?"],
    "a blue bus": ["is there a bus?", "is the bus blue?"],
    "a yellow umbrella": ["is there an umbrella?", "is the umbrella yellow?"],
    "a white unicorn": ["is there a unicorn?", "is the unicorn white?"],
    "a black and white cat": ["is there a cat?", "is the cat black?", "is the cat white?"],
    "a big, red ball": ["is there a ball?", "is the ball big?", "is the ball red?"],
    "a red square and black triangle": [
        "is there a square?", "is the square red?", "is there a triangle?", "is the triangle black?",
    ],
    "the car is red and the bus is blue": [
        "is there a car?", "is the car red?", "is there a bus?", "is the bus blue?",
    ],
    "the apple is small and green": ["is there an apple?", "is the apple small?", "is the apple green?"],
    "a dark red car": ["is there a car?", "is the car dark red?"],
    "a cream coloured vase": ["is there a vase?", "is the vase cream-colored?"],
    "a heart-shaped box": ["is there a box?", "is the box heart-shaped?"],
    "a pair of red shoes": ["are there shoes?", "are the shoes red?"],
    "A photo of a Red Car!": ["is there a car?", "is the car red?"],
    "a picture of a red car": ["is there a car?", "is the car red?"],
    "an image of a red car": ["is there a car?", "is the car red?"],
    "a man's red hat": ["is there a man?", "is there a hat?", "is the hat red?"],
    "an orange and a banana": ["is there an orange?", "is there a banana?"],
    "a strange red fire hydrant on the left side": [
        "is there a fire hydrant?", "is the fire hydrant strange?", "is the fire hydrant red?",
    ],
    "a glass bird feeder attracts the brown birds": [
        "is there a bird feeder?", "is the bird feeder made of glass?", "are there birds?", "are the birds brown?",
    ],
    "The fluffy white cat sat on the black leather couch": [
        "is there a cat?", "is the cat fluffy?", "is the cat white?",
        "is there a couch?", "is the couch black?", "is the couch made of leather?",
    ],
    "a red painted chair": ["is there a chair?", "is the chair red?"],
    "a brick building": ["is there a building?", "is the building made of brick?"],
    "a red light": ["is there a light?", "is the light red?"],
    "a cup made of blue and white porcelain": ["is there a cup?", "is the cup made of blue and white porcelain?"],
    "a table made of wood, glass, and steel": [
        "is there a table?", "is the table made of wood?", "is the table made of glass?", "is the table made of steel?",
    ],
    "a cat made of glass": ["is there a cat?", "is the cat made of glass?"],
    "two statues made out of solid gold, wearing hats": [
        "are there statues?", "are the statues made of solid gold?", "are there hats?",
    ],
    "a red lamp made of glass and steel on a chair made from stained wood": [
        "is there a lamp?", "is the lamp red?", "is the lamp made of glass?", "is the lamp made of steel?",
        "is there a chair?", "is the chair made of stained wood?",
    ],
    "a cup made of glass and metal chairs": [
        "is there a cup?", "is the cup made of glass?", "are there chairs?", "are the chairs made of metal?",
    ],
    "the cat is small and made of clay": ["is there a cat?", "is the cat small?", "is the cat made of clay?"],
    "a house made of brick attracts the birds": [
        "is there a house?", "is the house made of brick?", "are there birds?",
    ],
    "a black-and-white cat": ["is there a cat?", "is the cat black?", "is the cat white?"],
    "a small, black-and-white, fluffy dog": [
        "is there a dog?", "is the dog small?", "is the dog black?", "is the dog white?", "is the dog fluffy?",
    ],
    "a light-blue car": ["is there a car?", "is the car light-blue?"],
    "salt-and-pepper hair": ["is there a salt-and-pepper hair?"],
    'a "OPEN" sign in red': ["is there a sign?", "is the sign in red?"],
    "a wooden sign that says “red cat” and 'black dog'": ["is there a sign?", "is the sign made of wood?"],
    '"a red chair"': ["is there a chair?", "is the chair red?"],
    'a 5" screen and a 7" blue tablet': ["is there a screen?", "is there a tablet?", "is the tablet blue?"],
    "a woman in dark blue standing by a dog": [
        "is there a woman?", "is the woman in dark blue?", "is there a dog?",
    ],
    "a photo of a cat in black and white": ["is there a cat?", "is the cat in black and white?"],
    "a man in red and black shoes": [
        "is there a man?", "are there shoes?", "are the shoes red?", "are the shoes black?",
    ],
    "the sign is in red and the door is green": [
        "is there a sign?", "is the sign in red?", "is there a door?", "is the door green?",
    ],
    "a cat, the background in blue": ["is there a cat?", "is there a background?", "is the background in blue?"],
    "a cat in a box": ["is there a cat?", "is there a box?"],
}  # fmt: skip


@pytest.mark.parametrize("text", QUESTIONS)
def test_a_prompt_leads_to_these_questions(text: str) -> None:
    assert AttributeBinding().explain(Example(text)) == QUESTIONS[text]


def test_by_phrase_an_attribute_after_the_noun_stays_there() -> None:
    text = "a red lamp made of glass and two black-and-white cats in blue"
    found = AttributeBinding(questions="by_phrase").explain(Example(text))
    assert found == ["a red lamp made of glass?", "black white cats in blue?"]


@pytest.mark.parametrize("text", ["a cat made of glass", "a black-and-white cat", 'a "OPEN" sign in red'])
def test_an_attribute_after_its_noun_or_with_hyphens_is_enough(text: str) -> None:
    AttributeBinding().check([Example(text)])


def test_quoted_words_are_not_attributes() -> None:
    with pytest.raises(ConfigError, match="has no attribute to bind"):
        AttributeBinding().check([Example('a sign "RED"')])


@pytest.mark.parametrize(
    "text", ["", "red", "!!!", "two", "in front of", "a blue", "made of glass", "in red", "a light-blue"]
)
def test_a_text_without_a_noun_has_no_phrase(text: str) -> None:
    assert find_phrases(text) == []


def test_phrases_in_the_metadata_override_the_text() -> None:
    given = [{"head": "Bench", "attributes": ["Red", "wooden"]}, {"head": "cats", "plural": True}]
    found = phrases(Example("a green car", {"phrases": given}))
    assert found == [Phrase("bench", ("red", "wooden")), Phrase("cats", (), True)]


@pytest.mark.parametrize(
    "item",
    [
        "bench",
        {"attributes": ["red"]},
        {"head": "bench", "attrs": ["red"]},
        {"head": "b", "attributes": "red"},
        {"head": 3},
        {"head": "b", "attributes": None},
    ],
)
def test_malformed_metadata_is_refused_with_the_prompt(item: object) -> None:
    with pytest.raises(ConfigError, match=r"'a green car': metadata phrases: .*expected"):
        phrases(Example("a green car", {"phrases": [item]}))


def test_metadata_that_is_not_a_list_of_phrases_is_refused() -> None:
    with pytest.raises(ConfigError, match="'a green car': metadata phrases: found 'bench'"):
        phrases(Example("a green car", {"phrases": "bench"}))


def test_words_like_colored_without_a_colour_break_nothing() -> None:
    for text in ("a pair of colored, shaped toys", "a brightly colored, shaped rug"):
        assert all(thing.head for thing in find_phrases(text))
