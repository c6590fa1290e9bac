"""Corrupted references: every kind by the captions that can come of it, and what holds of all of them."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from mmft.data.caption_pool import COLOUR_FAMILY, CaptionPool
from mmft.data.corruption_kinds import GENERIC
from mmft.data.corruptions import CORRUPTIONS, corrupt, corrupted_pairs
from mmft.data.phrases import edited, noun_phrases, plural_of, singular_of, split_tokens, words_of
from mmft.data.scenes import EmojiScenes, score_caption
from mmft.metrics.lexicon import COLOURS
from mmft.metrics.text import tokenise
from mmft.types import Row, UserError


def pool_of(*references):
    return CaptionPool.from_rows([Row(str(i), None, "", (text,)) for i, text in enumerate(references)])


def outcomes(caption, kind, pool=None, references=(), seeds=200):
    """Every caption that can come of one: the same whatever order the generator's numbers have."""
    return {corrupt(caption, kind, random.Random(seed), pool or CaptionPool(), references) for seed in range(seeds)}


class Listed:
    """A source of rows given."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def rows_without_pictures(self, limit=None):
        return iter(self.rows[:limit])


class TestWrongWords:
    def test_noun_of_the_same_form_that_no_reference_has(self):
        pool = pool_of("an owl", "a red kite", "two horses", "some corn", "a dog on a sofa")
        assert outcomes("a big dog on two beds", "noun", pool) == {
            "a big owl on two beds",
            "a big kite on two beds",
            "a big sofa on two beds",
            "a big dog on two horses",
        }
        assert outcomes("a dog", "noun", pool, references=["a pet on the sofas", "kites"]) == {"an owl"}
        assert outcomes("Some rice.", "noun", pool) == {"Some corn."}
        assert outcomes("a dog", "noun") == {None}  # nothing to draw from

    def test_nouns_of_several_words_are_one(self):
        pool = pool_of("a fire hydrant")
        assert outcomes("a man riding a horse", "noun", pool) == {
            "a fire hydrant riding a horse",
            "a man riding a fire hydrant",
        }

    def test_colour_of_another_family_as_the_data_has_them(self):
        pool = pool_of("a red car", "a blue car", "an orange cat", "a grey wall", "a gold ring")
        assert outcomes("a yellow taxi", "colour", pool, ["a taxi by a gray wall"]) == {
            "a red taxi",
            "a blue taxi",
            "an orange taxi",
        }
        assert outcomes("The taxi is yellow.", "colour", pool_of("red", "golden")) == {"The taxi is red."}
        assert outcomes("an orange on a bed", "colour", pool) == {None}  # a fruit
        assert outcomes("a taxi", "colour", pool) == {None}

    def test_every_colour_has_a_family(self):
        assert COLOUR_FAMILY.keys() == COLOURS

    def test_count_with_its_noun_and_verb(self):
        pool = pool_of("a box", "two boxes", "three boxes")
        assert outcomes("two boxes", "count", pool) == {"a box", "three boxes"}
        assert outcomes("There is a big owl here", "count", pool) == {
            "There are two big owls here",
            "There are three big owls here",
        }
        assert outcomes("three owls are up", "count", pool) == {"an owl is up", "two owls are up"}
        assert outcomes("2 men", "count", pool) == {"1 man", "3 men"}
        # One reference says one, another two: neither is false for sure.
        assert outcomes("an owl", "count", pool, ["two owls"]) == {"three owls"}
        assert outcomes("several owls, the cat and a dozen eggs", "count", pool) == {None}

    def test_counts_of_other_things_are_no_limit(self):
        assert outcomes("two cats", "count", pool_of("a cat", "two cats"), ["two cats and one dog"]) == {"a cat"}

    def test_negation_of_a_phrase_or_a_verb(self):
        assert outcomes("A dog and two cats on a yellow background.", "negation") == {
            "No dog and two cats on a yellow background.",
            "A dog and no cats on a yellow background.",
        }
        assert outcomes("the dog is brown", "negation") == {"the dog is not brown"}
        assert outcomes("the dog is not brown", "negation") == {None}
        assert outcomes("some corn", "negation") == {"no corn"}

    @pytest.mark.parametrize(
        ("caption", "swapped"),
        [
            ("a dog above an owl, with two cats", {"an owl above a dog, with two cats"}),
            ("A man riding a horse.", {"A horse riding a man."}),
            ("two dogs are on a bed", {"a bed is on two dogs"}),
            ("a dog to the left of a cat", {"a cat to the left of a dog"}),
            ("a cat on the left and two dogs on the right", {"two dogs on the left and a cat on the right"}),
            # what reads the same from either side is not swapped
            ("a dog next to a cat", {None}),
            ("a dog and a cat", {None}),
            ("people standing around a table", {None}),
            ("a dog on a yellow background", {None}),
            ("a cat on the left and two dogs on the left", {None}),
        ],
    )
    def test_swapped_roles(self, caption, swapped):
        assert outcomes(caption, "swapped_roles") == swapped

    def test_three_places_give_three_exchanges(self):
        assert outcomes("a cat at the top, a dog at the bottom and an owl in the middle", "swapped_roles") == {
            "a dog at the top, a cat at the bottom and an owl in the middle",
            "an owl at the top, a dog at the bottom and a cat in the middle",
            "a cat at the top, an owl at the bottom and a dog in the middle",
        }


class TestWrongForm:
    def test_truncation_leaves_hanging_where_it_can(self):
        assert outcomes("a dog sleeps on a red bed.", "truncation") == {
            "a dog sleeps on",
            "a dog sleeps on a",
            "a dog sleeps on a red",
        }
        assert outcomes("dogs run, fast", "truncation") == {"dogs", "dogs run"}
        assert outcomes("dogs", "truncation") == {None}

    def test_repeat_of_all_or_of_the_last_phrase(self):
        whole = {f"A dog on a bed{link}a dog on a bed." for link in (" ", ", ", " and ")}
        last = {f"A dog on a bed{link}a bed." for link in (" ", ", ", " and ")}
        assert outcomes("A dog on a bed.", "repeat") == whole | last

    def test_shuffle_breaks_most_neighbours(self):
        # Of the six orders, those without the neighbours a-dog and dog-barks; one kept of two is not most.
        assert outcomes("a dog barks", "shuffle") == {"a barks dog", "barks dog a", "dog a barks"}
        mixed = outcomes("A dog and a cat.", "shuffle")
        assert None not in mixed and len(mixed) > 10
        assert "A cat and a dog." not in mixed
        assert all(sorted(tokenise(text)) == ["a", "a", "and", "cat", "dog"] for text in mixed)
        assert all(text[0].isupper() and text.endswith(".") for text in mixed)

    def test_generic_names_nothing_or_what_many_rows_say(self):
        assert outcomes("a dog on two beds", "generic") == {*GENERIC, "something on some things"}
        pool = pool_of(*["a man"] * 6, "a dog", "a cat")
        assert outcomes("dogs", "generic", pool) == {*GENERIC, "some things", "a man"}
        # true of this picture: no fault
        assert outcomes("dogs", "generic", pool, ["a man with dogs"]) == {*GENERIC, "some things"}
        assert outcomes("A dog.", "generic") == {f"{text.capitalize()}." for text in (*GENERIC, "something")}

    def test_noun_list(self):
        assert outcomes("a big dog on a red fire truck at the top", "noun_list") == {
            "dog fire truck",
            "dog, fire truck",
        }
        assert outcomes("dog", "noun_list") == {None}

    def test_other_picture_says_something_else(self):
        pool = pool_of("a dog", "a dog and a cat", "dogs", "a kite")
        assert outcomes("a big dog", "other_picture", pool) == {"a dog and a cat", "a kite"}
        assert outcomes("a cat, a dog", "other_picture", pool, ["a kite"]) == {None}


class TestPhrases:
    @pytest.mark.parametrize(
        ("caption", "phrases"),
        [
            ("A man riding a wave on top of a surfboard.", ["a man", "a wave", "a surfboard"]),
            ("the two dogs, a cat", ["the two dogs", "a cat"]),
            ("a red and blue ball on a white background", ["a red and blue ball"]),
            ("an orange picture with an orange", ["an orange"]),
            ("a black-and-white photo of a sleeping dog", ["a sleeping dog"]),
            ("a pair of shoes", ["shoes"]),
            ("three", []),
            ("", []),
        ],
    )
    def test_phrases(self, caption, phrases):
        tokens = split_tokens(caption)
        assert [" ".join(words_of(tokens, p.start, p.end)) for p in noun_phrases(tokens)] == phrases

    @pytest.mark.parametrize(
        ("one", "many"),
        [
            ("box", "boxes"),
            ("berry", "berries"),
            ("boy", "boys"),
            ("man", "men"),
            ("bus", "buses"),
            ("fish", "fish"),
            ("leaf", "leaves"),
            ("tomato", "tomatoes"),
            ("shoe", "shoes"),
            ("horse", "horses"),
            ("pie", "pies"),
            ("rose", "roses"),
            ("glass", "glasses"),
            ("dish", "dishes"),
        ],
    )
    def test_plurals_by_rule(self, one, many):
        assert plural_of(one) == many
        assert singular_of(many) == one

    def test_the_data_spells_its_own_plurals(self):
        pool = pool_of("two snowmans", "a snowman", "a leaf", "three leaves")
        assert pool.inflected("snowman", plural=True) == "snowmans"
        assert pool.inflected("leaves", plural=False) == "leaf"
        assert CaptionPool().inflected("church", plural=True) == "churches"

    def test_edits_keep_punctuation_and_mend_the_article(self):
        tokens = split_tokens('A "big" dog, (asleep).')
        assert edited(tokens, {(1, 2): ["old"]}) == 'An "old" dog, (asleep).'
        assert edited(tokens, {(2, 3): ["cat"], (3, 4): ["awake"]}) == 'A "big" cat, (awake).'


class TestPairs:
    SCENES = EmojiScenes(300, "train", 0)

    def pairs(self, **options):
        return list(corrupted_pairs(self.SCENES, pictures=False, **options))

    @pytest.mark.parametrize("kind", CORRUPTIONS)
    def test_never_true_word_for_word_always_different(self, kind):
        pairs = self.pairs(kinds=[kind], per_row=2, seed=3)
        assert len(pairs) >= 250
        for row, chosen, rejected, made in pairs:
            assert made == kind
            assert chosen in row.references
            assert tokenise(rejected) not in {tokenise(text) for text in row.references}
            assert rejected == " ".join(rejected.split()) != ""

    def test_wrong_words_are_wrong_by_the_scene_graph(self):
        """The oracle's view: a swapped noun is not in the picture, a changed count or colour not the picture's."""
        for kind, score in [
            ("noun", "object_precision"),
            ("count", "count_accuracy"),
            ("colour", "attribute_accuracy"),
        ]:
            pairs = self.pairs(kinds=[kind])
            assert len(pairs) > 250
            scores = [
                (score_caption(chosen, row.scene)[score], score_caption(rejected, row.scene)[score])
                for row, chosen, rejected, _ in pairs
            ]
            right = [rejected for chosen, rejected in scores if chosen == 1.0]  # NaN where nothing of it is said
            assert len(right) > 150, kind
            assert all(rejected < 1.0 for rejected in right), kind

    def test_kinds_take_turns(self):
        counts = Counter(kind for *_, kind in self.pairs(per_row=4))
        assert sum(counts.values()) == 4 * 300
        assert min(counts[kind] for kind in CORRUPTIONS) > 60  # of 1200 / 11 = 109

    def test_deterministic_and_independent_of_the_order_of_rows(self):
        rows = list(self.SCENES.rows_without_pictures(40))
        backwards = Listed(rows[::-1])

        def by_row(source, seed):
            found = [(row.id, *pair) for row, *pair in corrupted_pairs(source, per_row=3, seed=seed, pictures=False)]
            return sorted(found)

        assert by_row(Listed(rows), 1) == by_row(Listed(rows), 1) == by_row(backwards, 1)
        assert by_row(Listed(rows), 1) != by_row(Listed(rows), 2)

    def test_pairs_of_a_row_are_different_and_end(self):
        source = Listed([Row("a", None, "", ("dogs",)), Row("b", None, "", ())])
        pairs = list(corrupted_pairs(source, per_row=50))
        assert {row.id for row, *_ in pairs} == {"a"}
        assert len({rejected for *_, rejected, _ in pairs}) == len(pairs) > 5  # and then there are no more

    def test_pictures_come_along_when_asked(self):
        row, *_ = next(corrupted_pairs(EmojiScenes(2), seed=0))
        assert row.image is not None
        assert next(corrupted_pairs(EmojiScenes(2), pictures=False))[0].image is None

    def test_mistakes(self):
        with pytest.raises(UserError, match=r"corruption 'color': no such kind; did you mean colour\?"):
            corrupted_pairs(self.SCENES, kinds=["color"])
        with pytest.raises(UserError, match="no row has references"):
            corrupted_pairs(Listed([Row("a", None, "")]))
        with pytest.raises(UserError, match="per_row is 0"):
            corrupted_pairs(self.SCENES, per_row=0)
