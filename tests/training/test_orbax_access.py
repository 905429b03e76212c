"""How checkpoints use Orbax."""

import pytest

tensorstore = pytest.importorskip("tensorstore")

from orbax.checkpoint._src.serialization import tensorstore_utils  # noqa: E402

from worldloom.training.orbax_access import describe_folders_once  # noqa: E402


@pytest.fixture(scope="module")
def describe():
    """Orbax's function as it is, and as it is after the first checkpoint."""
    describe_folders_once()
    return tensorstore_utils.build_kvstore_tspec.__wrapped__, tensorstore_utils.build_kvstore_tspec


@pytest.mark.parametrize("options", [{}, {"use_ocdbt": True}, {"use_ocdbt": False}])
@pytest.mark.parametrize("name", [None, "params/encoder/kernel", "a.b"])
def test_an_array_of_a_folder_is_described_as_orbax_describes_it(describe, tmp_path, name, options):
    original, remembered = describe
    for folder in (tmp_path / "100", tmp_path / "200", tmp_path / "100"):
        assert remembered(str(folder), name, **options) == original(str(folder), name, **options)


def test_a_description_belongs_to_who_asked_for_it(describe, tmp_path):
    original, remembered = describe
    spec = remembered(str(tmp_path), "a")
    spec["base"].clear()
    spec["config"] = 1
    assert remembered(str(tmp_path), "a") == original(str(tmp_path), "a")


def test_tensorstore_is_asked_at_most_once_for_each_folder(describe, tmp_path, monkeypatch):
    asked = []
    spec = tensorstore.KvStore.Spec

    class Counted:
        class KvStore:
            @staticmethod
            def Spec(description):
                asked.append(description)
                return spec(description)

    monkeypatch.setattr(tensorstore_utils, "ts", Counted)
    for number in range(20):
        describe[1](str(tmp_path / "300"), f"array{number}")
    assert len(asked) <= 1  # Orbax before 0.11.40 does not ask.
