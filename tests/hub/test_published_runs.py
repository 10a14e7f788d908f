"""What the page that compares runs finds on the Hub."""

import pytest
from huggingface_hub import HfApi

from trl_interfere.app.catalog import Catalog
from trl_interfere.hub.push import push_folder


def test_a_published_run_is_found_by_its_tag_and_read(hub, healed_run):
    push_folder(healed_run, "tester/lab-run")
    HfApi().create_repo("tester/lab-other")  # without the tag
    catalog = Catalog()
    assert catalog.search() == catalog.search("lab") == ["tester/lab-run"]
    assert catalog.search("nothing-of-the-kind") == []

    published, local = catalog.open("tester/lab-run"), Catalog([healed_run])
    own = local.open(local.names[0])
    assert published.models == own.models and published.verdict == own.verdict
    assert published.arms() == own.arms() and len(published.reports) == len(own.reports)


def test_repositories_that_cannot_be_shown(hub):
    HfApi().create_repo("tester/empty")
    for name in ("tester/empty", "tester/absent"):
        with pytest.raises(ValueError, match=name):
            Catalog().open(name)
    hub.fail("GET", "/api/models", status=500, times=20)
    with pytest.raises(ValueError, match="the Hub cannot be reached"):
        Catalog().search()
