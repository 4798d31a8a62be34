"""The mutations follow the code: what each breaks stands in its file, once."""

import pytest
from mutate import MUTATIONS, ROOT, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.breaks)
def test_what_a_mutation_breaks_is_there(mutation: Mutation) -> None:
    text = (ROOT / "src_c" / mutation.file).read_text()
    assert text.count(mutation.old) == 1
    assert mutation.new != mutation.old
