import json
import re

import numpy as np
import pytest
import tensorflow_datasets

from jaxlm.config import DataConfig, TokenizerConfig
from jaxlm.data import corpora, prepare, tfds
from tests.reviews import Reviews


class Play(Reviews):
    """One long example."""

    def _split_generators(self, manager):
        return {"train": self._examples(1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prepared without TensorFlow, the training split in three shards."""
    folder = tmp_path_factory.mktemp("tfds")
    builder = Reviews(data_dir=str(folder), file_format="array_record")
    Play(data_dir=str(folder), file_format="array_record").download_and_prepare()
    builder.download_and_prepare(download_config=tensorflow_datasets.download.DownloadConfig(num_shards=3))
    return str(folder)


def read(*source, **options):
    data = DataConfig(source=source, **options)
    return [document for file in corpora.files(data) for document in corpora.read(file, data)]


def test_a_prepared_data_set_is_read_shard_by_shard(folder):
    data = DataConfig(source=("tfds:reviews",), tfds_dir=folder)
    files = corpora.files(data)
    assert [file.path for file in files] == [f"tfds:reviews:train[{i}shard:{i + 1}shard]" for i in range(3)]
    found = read("mine=tfds:reviews", tfds_dir=folder, id_key="number", licences=(("mine", "MIT"),))
    assert sorted(int(d.id) for d in found) == list(range(40))
    assert all(d.text == f"review é {d.id}\n\n" and d.source == "mine" and d.licence == "MIT" for d in found)
    assert [d.text for d in found] == [d.text for d in read("tfds:reviews:train", tfds_dir=folder)]
    assert len(read("tfds:reviews:train[:10]", tfds_dir=folder)) == 10
    assert read("tfds:reviews", tfds_dir=folder)[0].id == "tfds:reviews:train[0shard:1shard]:1"


def test_a_split_of_one_example_is_divided_as_a_text_file_is(folder):
    found = read("tfds:play", tfds_dir=folder)
    assert "".join(d.text for d in found) == "review é 0\n\n" * 9000 and len(found) > 5


def test_a_corpus_can_be_prepared_from_it(folder, tmp_path):
    data = DataConfig(source=("tfds:reviews",), tfds_dir=folder, validation=0.2, test=0.2)
    corpus = prepare.prepare(data, TokenizerConfig(kind="bytes"), tmp_path / "data", log=lambda line: None)
    assert sum(split["documents"] for split in corpus.manifest["splits"].values()) == 40 and corpus.manifest["source"] == {"files": 0, "bytes": 0}


@pytest.mark.parametrize("source, options, message", [
    ("tfds:reviews:dev", {}, "data.source='tfds:reviews:dev': reviews has no split 'dev'; its splits: train, test"),
    ("tfds:reviews", {"text_key": "body"}, "no feature 'body'; its features: 'label', 'number', 'text'; set data.text_key"),
    ("tfds:reviews", {"text_key": "label", "id_key": "name"}, "no feature 'name'"),
    ("tfds:", {}, "data.source='tfds:' is not of the form tfds:NAME"),
    ("tfds:reviews:train[", {}, "is not of the form tfds:NAME"),
    ("tfds:no_such_set", {}, "tfds:no_such_set is neither prepared in"),
    ("tfds:imdb_reviews", {}, "tfds:imdb_reviews is not prepared in"),
    ("tfds:imdb_reviews/nothing", {}, "tfds:imdb_reviews/nothing cannot be opened"),
])
def test_what_is_not_there_is_one_line(folder, source, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read(source, tfds_dir=folder, **options)
    assert "\n" not in str(caught.value)
    if "prepared" in message:
        assert f"tfds build {source[5:]} --file_format=array_record --data_dir={folder}" in str(caught.value)


def metadata(folder, name, features, splits):
    """What a prepared data set's folder says of it, which TFDS's mock data fills."""
    path = folder / name / "1.0.0"
    path.mkdir(parents=True)
    text = {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}}
    (path / "features.json").write_text(json.dumps({"pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
                                                    "featuresDict": {"features": dict.fromkeys(features, text)}}))
    (path / "dataset_info.json").write_text(json.dumps({
        "name": name.split("/")[0], "configName": name.partition("/")[2], "version": "1.0.0", "fileFormat": "array_record",
        "splits": [{"name": split, "shardLengths": ["2"] * shards, "numBytes": "1", "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"}
                   for split, shards in splits.items()]}))


@pytest.mark.parametrize("name, features, shards", [
    ("tiny_shakespeare", ("text",), 1), ("imdb_reviews", ("text", "label"), 1), ("wiki40b/en", ("text", "version_id"), 16), ("c4/en", ("text", "url"), 64)])
def test_the_well_known_data_sets_with_mock_data(tmp_path, name, features, shards):
    metadata(tmp_path, name, features, {"train": shards, "validation": 1})
    with tensorflow_datasets.testing.mock_data(num_examples=5, data_dir=str(tmp_path)):
        data = DataConfig(source=(f"tfds:{name}",))
        files = corpora.files(data)
        found = [document for file in files for document in corpora.read(file, data)]
    assert len(files) == shards and len(found) == 5 * shards
    assert all(isinstance(document.text, str) and document.text for document in found) and len({document.id for document in found}) == len(found)


@pytest.mark.parametrize("name", ["tiny_shakespeare", "imdb_reviews"])
def test_mock_data_without_metadata(name):
    with tensorflow_datasets.testing.mock_data(num_examples=3):
        assert len(read(f"tfds:{name}")) == 3
    assert tfds.PREFIX == "tfds:"


def test_examples_are_plain_values(folder):
    found = tfds.examples("tfds:reviews:train", folder)
    assert len(found) == 40 and sorted(one["number"] for one in found) == list(range(40))
    assert all(type(one["label"]) is int and one["text"] == f"review é {one['number']}\n\n" for one in found)
    with pytest.raises(ValueError, match="has no split 'dev'"):
        tfds.examples("tfds:reviews:dev", folder)
    nested = {"a": {"b": np.array([b"x", b"y"], object)}, "c": np.bool_(True), "d": np.zeros((2, 1), np.int64)}
    assert tfds._plain(nested) == {"a": {"b": ["x", "y"]}, "c": True, "d": [[0], [0]]}
