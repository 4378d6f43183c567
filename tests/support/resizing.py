"""Sizes to resize from and to."""

from __future__ import annotations

from hypothesis import strategies as st

from featpipe.backbones.resize.embedding_bag import ResizeAxis


@st.composite
def axes(draw: st.DrawFn, shrunk: int = 33) -> ResizeAxis:
    """Some way to resize and crop, to one in so many pixels at least."""
    before = draw(st.integers(1, 300))
    after = draw(st.one_of(st.integers(1, 300), st.just(before), st.integers(max(1, before // shrunk), before)))
    start = draw(st.integers(0, after - 1))
    return ResizeAxis(before, after, start, draw(st.integers(1, after - start)))
