"""Reading the data sets that the shipped domains are made of."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets

from .domain import Domain
from .recipe import check_names, read_dataset
from .splits import normal_key, split_dataset


@dataclass(frozen=True)
class Source:
    """
    A data set on the Hub.

    Args:
        path (`str`):
            Its id.
        columns (`dict[str, str]`):
            Columns that are used, new name to the name in the data set.
        split (`str`, *optional*, defaults to `"train"`):
            Its split.
        name (`str`, *optional*):
            Its configuration.
    """

    path: str
    columns: dict[str, str]
    split: str = "train"
    name: str | None = None


@dataclass
class Parts:
    """
    Rows of the three parts of a domain.

    Args:
        train ([`~datasets.Dataset`], *optional*):
            Rows to train on.
        selection ([`~datasets.Dataset`], *optional*):
            Rows that choices are made on.
        test ([`~datasets.Dataset`], *optional*):
            Rows that scores are reported on.
    """

    train: Dataset | None = None
    selection: Dataset | None = None
    test: Dataset | None = None

    def to_domain(self, name: str, **settings: Any) -> Domain:
        """
        The domain of these parts.

        Args:
            name (`str`):
                Its name.
            settings (`Any`):
                Rewards and metric.

        Returns:
            [`Domain`]: The domain.
        """
        return Domain(
            name=name, train_dataset=self.train, selection_dataset=self.selection, eval_dataset=self.test, **settings
        )


def read_source(
    source: Source,
    where: str,
    path: str | None = None,
    columns: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Dataset:
    """
    Read the columns of a data set that a domain uses.

    Args:
        source ([`Source`]):
            The data set.
        where (`str`):
            Who asks, for the message.
        path (`str`, *optional*):
            A local copy, of any form that a YAML file can name. Defaults to the Hub.
        columns (`Mapping[str, str]`, *optional*):
            Other names of columns, where the data set has changed.
        folder (`pathlib.Path`, *optional*):
            Folder that a relative path starts from. Defaults to the working directory.

    Returns:
        [`~datasets.Dataset`]: Rows with the columns of the source.

    Raises:
        `ValueError`: If it cannot be read, or lacks a column.
    """
    wanted = {**source.columns, **(columns or {})}
    check_names(wanted, source.columns, f"{where}, columns")
    reference = {"path": path or source.path, "split": source.split}
    if path is None and source.name is not None:
        reference["name"] = source.name
    dataset = read_dataset(reference, where, folder or Path.cwd())
    missing = sorted(set(wanted.values()) - set(dataset.column_names))
    if missing:
        raise ValueError(
            f"{where}: expected the columns {sorted(wanted.values())} in {reference['path']!r}, found "
            f"{dataset.column_names}; give other names by `columns`, e.g. {{{next(iter(wanted))}: NAME}}"
        )
    dataset = dataset.select_columns(list(dict.fromkeys(wanted.values())))
    return dataset.rename_columns({old: new for new, old in wanted.items() if old != new})


def deal(
    dataset: Dataset, sizes: Mapping[str, int | None], where: str, key: str = "key", strata: str | None = None
) -> Parts:
    """
    Deal rows to train, selection and test, see [`split_dataset`].

    Args:
        dataset ([`~datasets.Dataset`]):
            The rows.
        sizes (`Mapping[str, int]`):
            Rows of each part.
        where (`str`):
            Who asks, for the message.
        key (`str`, *optional*, defaults to `"key"`):
            Column of the text that tells prompts apart. It is dropped if it is the default.
        strata (`str`, *optional*):
            Column of the stratum.

    Returns:
        [`Parts`]: The parts.
    """
    keys = dataset[key]
    values = None if strata is None else dataset[strata]
    dropped = [column for column in ("key", strata) if column in dataset.column_names and column is not None]
    return Parts(**split_dataset(dataset.remove_columns(dropped), keys, sizes, where, values))


def joined(*datasets: Dataset) -> Dataset:
    """
    Data sets one after the other.

    Args:
        datasets ([`~datasets.Dataset`]):
            Data sets with the same columns.

    Returns:
        [`~datasets.Dataset`]: All their rows.
    """
    return datasets[0] if len(datasets) == 1 else concatenate_datasets(list(datasets))


def check_source(name: str, known: Iterable[str], where: str) -> None:
    """
    Refuse a data set that a domain does not know.

    Args:
        name (`str`):
            Its name.
        known (`Iterable[str]`):
            Names that the domain knows.
        where (`str`):
            Who asks, for the message.

    Raises:
        `ValueError`: If it is none of them.
    """
    if name not in known:
        raise ValueError(f"{where}, source: expected one of {sorted(known)}, found {name!r}")


def apart(dataset: Dataset, test: Dataset, key: str = "key") -> Dataset:
    """
    Rows whose prompt is not among the test prompts.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows for training and selection.
        test ([`~datasets.Dataset`]):
            Rows that scores are reported on.
        key (`str`, *optional*, defaults to `"key"`):
            Column of the text that tells prompts apart.

    Returns:
        [`~datasets.Dataset`]: The rows that are left.
    """
    taken = {normal_key(value) for value in test[key]}
    return dataset.select([row for row, value in enumerate(dataset[key]) if normal_key(value) not in taken])
