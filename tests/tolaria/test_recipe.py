"""A session is the documented recipe, to the bit."""

import pytest
import torch
from tolaria_plain_loop import plain_loop
from tolaria_tasks import Small
from tolaria_tasks import small_data
from tolaria_tasks import small_loss
from tolaria_world import make_config

from esper.runtime.kasmina.digest import weights_digest


def small_task():
    model = Small()
    train, _ = small_data()
    return model, train, small_loss


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.01),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.01),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.01),
}


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_dormant_session_ends_in_the_bits_of_the_plain_loop(drive, optimizer, schedule):
    settings = {"name": optimizer, "schedule": {"name": schedule, "warmup": 0.1}}
    if optimizer == "sgd":
        settings["momentum"] = 0.9
    config = make_config(run={"max_epochs": 3}, optimizer=settings)
    driver = drive(config)
    driver.train(1, 2, 3, expects_decision=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    plain = plain_loop(
        small_task,
        OPTIMIZERS[optimizer],
        seed=3,
        epochs=3,
        batch_size=32,
        lr=0.01,
        schedule=schedule,
        warmup=0.1,
        clip=1.0,
    )
    torch.set_num_threads(threads)
    assert driver.digest() == weights_digest(plain)


def test_another_seed_ends_in_other_bits(drive):
    digests = set()
    for seed in (0, 1):
        driver = drive(make_config(run={"max_epochs": 1, "seed": seed}), run_id=f"seed-{seed}")
        driver.train(1)
        digests.add(driver.digest())
    assert len(digests) == 2
