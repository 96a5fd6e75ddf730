"""Fine-tune a sentence-transformers model with HIER, and retrieve among classes it was not trained on.

Texts have two levels of classes, written "COARSE:fine". Every other fine class is trained on, by its fine labels
alone; retrieval among the rest is scored on fine and on coarse classes, before and after. Without arguments the
texts are sentences made here, and the model is a small one without any pretraining, so that nothing is downloaded.
With --model, any sentence-transformers model or its folder; with --data, trec_questions.npz, the questions of the
TREC question classification data as arrays "text" and "label", or clinc150.json, the questions of CLINC150.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from pytorch_metric_learning import losses
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from rich.console import Console
from rich.table import Table
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from hierloss import HIERLoss
from hierloss.sentence_transformers import PMLLoss

METRICS = {"precision_at_1": "R@1", "mean_average_precision_at_r": "MAP@R"}
SENTENCES = {  # coarse class: sentences, and for each fine class what is put into them
    "FOOD": (
        ["How do I cook {}?", "Where is fresh {} sold?", "How long does {} keep?", "Which wine goes with {}?"],
        {
            "cheese": "cheddar brie gouda feta mozzarella",
            "fish": "salmon cod trout herring tuna",
            "grain": "rice barley millet oats quinoa",
            "vegetable": "cabbage spinach leek fennel kale",
        },
    ),
    "PLACE": (
        ["How do I get to {}?", "What is {} known for?", "Is {} cold in winter?", "Who founded a school in {}?"],
        {
            "city": "Lisbon Oslo Cairo Lima Hanoi",
            "country": "Norway Peru Kenya Laos Chile",
            "island": "Crete Malta Java Iceland Cuba",
            "state": "Texas Ohio Utah Bavaria Kerala",
        },
    ),
    "ANIMAL": (
        ["What does a {} eat?", "How old does a {} get?", "Where does a {} sleep?", "Is a {} awake at night?"],
        {
            "bird": "robin heron sparrow falcon wren",
            "insect": "beetle wasp moth ant cricket",
            "mammal": "badger otter moose hare bat",
            "reptile": "gecko cobra tortoise iguana viper",
        },
    ),
    "MUSIC": (
        ["Who plays the {} well?", "When was the {} invented?", "How is a {} tuned?", "What does a {} cost new?"],
        {
            "drum": "timpani bongo tabla snare conga",
            "key": "piano organ celesta harpsichord accordion",
            "string": "violin cello harp lute banjo",
            "wind": "flute oboe bassoon trumpet tuba",
        },
    ),
}


def main() -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", help="a sentence-transformers model or its folder; if not given, one made here")
    parser.add_argument(
        "--data", type=Path, help="trec_questions.npz or clinc150.json; if not given, texts made here"
    )
    parser.add_argument("--epochs", type=int, default=100, help="passes over the training set")
    parser.add_argument("--lr", type=float, help="of the model; if not given, 2e-5 with --model, 1e-2 without")
    parser.add_argument("--gradient-ratio", type=float, default=0.1, help="gradient of HIER over the base loss's")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    texts, labels = made_here() if args.data is None else load(args.data)
    fine_names, fine = np.unique(labels, return_inverse=True)
    coarse = np.unique([label.split(":")[0] for label in labels], return_inverse=True)[1]
    seen = fine % 2 == 0
    model = untrained(texts) if args.model is None else SentenceTransformer(args.model)
    unseen_levels = {"fine": torch.from_numpy(fine[~seen]), "coarse": torch.from_numpy(coarse[~seen])}

    scores = {"before": retrieve(model, texts[~seen], unseen_levels)}
    lr = args.lr or (1e-2 if args.model is None else 2e-5)
    train(model, texts[seen], fine[seen] // 2, args.epochs, lr, args.gradient_ratio)
    scores["after"] = retrieve(model, texts[~seen], unseen_levels)

    title = f"{(~seen).sum()} texts of {len(fine_names) // 2} classes not trained on, in %"
    table = Table("training", *scores["before"], title=title)
    for name, row in scores.items():
        table.add_row(name, *(f"{value:.1f}" for value in row.values()))
    Console().print(table)
    return scores


def train(
    model: SentenceTransformer, texts: np.ndarray, labels: np.ndarray, epochs: int, lr: float, ratio: float
) -> None:
    size = model.get_embedding_dimension()
    base = losses.ProxyAnchorLoss(num_classes=int(labels.max()) + 1, embedding_size=size)
    hier = HIERLoss(num_proxies=64, embedding_size=size, gradient_ratio=ratio)
    # The line that adds HIER.
    loss = PMLLoss(model, losses.MultipleLosses([base, hier]))
    with tempfile.TemporaryDirectory() as folder:
        args = SentenceTransformerTrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=64,
            batch_sampler=BatchSamplers.GROUP_BY_LABEL,
            learning_rate=lr,
            learning_rate_mapping={"proxies": 1e-2},  # class proxies and hierarchical proxies
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to="none",
        )
        data = Dataset.from_dict({"text": texts.tolist(), "label": labels.tolist()})
        # With checkpoints, callbacks=[SaveLossCallback(loss)] saves the proxies too.
        SentenceTransformerTrainer(model, args, data, loss=loss).train()


def retrieve(model: SentenceTransformer, texts: np.ndarray, levels: dict[str, torch.Tensor]) -> dict[str, float]:
    model.eval()
    embeddings = model.encode(texts.tolist(), convert_to_tensor=True).cpu()
    calculator = AccuracyCalculator(include=tuple(METRICS), knn_func=CustomKNN(CosineSimilarity()))
    scores: dict[str, float] = {}
    for level, labels in levels.items():
        accuracy = calculator.get_accuracy(embeddings, labels)
        scores |= {f"{name} {level}": 100 * float(accuracy[key]) for key, name in METRICS.items()}
    return scores


def untrained(texts: np.ndarray) -> SentenceTransformer:
    """The mean of an embedding of each word."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts.tolist(), trainers.WordLevelTrainer(special_tokens=["[UNK]"]))
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=128)])


def made_here() -> tuple[np.ndarray, np.ndarray]:
    rows = [
        (sentence.format(word), f"{coarse}:{fine}")
        for coarse, (sentences, fine_classes) in SENTENCES.items()
        for fine, words in fine_classes.items()
        for word in words.split()
        for sentence in sentences
    ]
    texts, labels = np.array(rows).T
    return texts, labels


def load(file: Path) -> tuple[np.ndarray, np.ndarray]:
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            return arrays["text"], arrays["label"]
    content = json.loads(file.read_text())
    rows = [(text, f"{content['domain'][intent]}:{intent}") for text, intent in content["test"]]
    return np.array([text for text, _ in rows]), np.array([label for _, label in rows])


if __name__ == "__main__":
    main()
