"""A piece of a text finds what the plainest attention says, and the same bits however the text is cut."""

import pytest
import torch
from paged_texts import DIM, SIZE, WAYS, Texts, asked, random, wanted

from llmlab.kernels.attending_pieces import attend_piece


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_0"])
def test_a_piece_of_a_text(kind, way, monkeypatch):
    texts, text, group = Texts(kind), 6, 3
    for room, asks in ((1 << 19, ((0, 350), (47, 100))), (1 << 14, ((0, 2), (200, 150), (348, 2)))):
        monkeypatch.setattr("llmlab.kernels.attending_pieces.ROOM", room)    # gathered at once, and in several pieces
        for first, count in asks:
            q = random(count, 3 * group, DIM, seed=first) * 2
            given = asked(way, 3 * group)
            true = wanted(texts, text, q, first, 0.125, **given)
            blocks = torch.tensor(texts.blocks[text])
            found = attend_piece(q, *texts.both, blocks, first, scale=0.125, **given)
            assert (found.double() - true).abs().max() < 2e-6 * true.abs().max()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_a_text_in_any_pieces_finds_the_same_bits(kind, way):
    texts, text = Texts(kind), 6
    q, blocks, given = random(350, 9, DIM, seed=3), torch.tensor(texts.blocks[text]), asked(way, 9)
    whole = attend_piece(q, *texts.both, blocks, 0, scale=0.125, **given)
    for stops in ((64, 65, 200, 350), (1, 3, 63, 190, 349, 350), (100, 350)):
        parts = [attend_piece(q[first:stop], *texts.both, blocks[:-(-stop // SIZE)], first, scale=0.125, **given)
                 for first, stop in zip((0, *stops), stops, strict=False)]
        assert torch.equal(torch.cat(parts), whole)
