"""The card in a push and in the folder of a run; what it says is tested beside `reporting`."""

import re

from huggingface_hub import ModelCard

from trl_interfere.hub.callback import write_card
from trl_interfere.hub.push import plan_push


def test_metadata_of_a_push(run):
    (main,) = plan_push(run, "tester/model", license="apache-2.0").revisions
    data = ModelCard(main.files["README.md"].decode()).data.to_dict()
    assert data["license"] == "apache-2.0" and "base_model" not in data  # the lab's model is not on the Hub


def test_every_figure_is_a_file_of_the_push(run):
    for stages in (False, True):
        plan = plan_push(run, "tester/model", stages=stages)
        main = plan.revisions[-1]
        shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", main.files["README.md"].decode())
        assert len(shown) >= 4 and set(shown) <= set(main.files)


def test_the_card_can_be_made_later_from_a_folder(copied):
    (copied / "README.md").unlink(missing_ok=True)
    text = write_card(copied).read_text()
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (copied / path).is_file()
    assert "## How it was made" in text and "(figures/score_matrix.png)" in text
