"""Random resize and crop operations along one axis."""

from __future__ import annotations

from hypothesis import strategies as st

from featpipe.backbones.resize.embedding_bag import ResizeAxis


@st.composite
def axes(draw: st.DrawFn, shrunk: int = 33) -> ResizeAxis:
    """Draw a resize and crop along one axis that shrinks it at most by the factor `shrunk`."""
    old_size = draw(st.integers(1, 300))
    new_size = draw(
        st.one_of(st.integers(1, 300), st.just(old_size), st.integers(max(1, old_size // shrunk), old_size))
    )
    start = draw(st.integers(0, new_size - 1))
    return ResizeAxis(old_size, new_size, start, draw(st.integers(1, new_size - start)))
