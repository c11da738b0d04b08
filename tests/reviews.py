"""A data set of TensorFlow Datasets of our own. TFDS knows a name once in a process, so tests share it."""

import numpy as np
import tensorflow_datasets


class Reviews(tensorflow_datasets.core.GeneratorBasedBuilder):
    """Some texts with a label and a number."""

    VERSION = tensorflow_datasets.core.Version("1.0.0")

    def _info(self):
        return tensorflow_datasets.core.DatasetInfo(builder=self, features=tensorflow_datasets.features.FeaturesDict({
            "text": tensorflow_datasets.features.Text(), "label": tensorflow_datasets.features.ClassLabel(num_classes=2),
            "number": tensorflow_datasets.features.Scalar(np.int64)}))

    def _split_generators(self, manager):
        return {"train": self._examples(40), "test": self._examples(3)}

    def _generate_examples(self):
        raise NotImplementedError

    def _examples(self, count):
        for i in range(count):
            yield i, {"text": f"review é {i}\n\n" * (1 if count > 1 else 9000), "label": i % 2, "number": i}
