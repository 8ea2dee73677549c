"""The worked example in docs/explanation/compute.md has the numbers of the registry."""

from pathlib import Path

from mmtrain.flops import load_registry
from mmtrain.flops.hours import hours_table


def test_the_claim_of_five_times_less_is_what_the_registry_says():
    page = (Path(__file__).parents[2] / "docs" / "explanation" / "compute.md").read_text()
    models = {baseline.id: baseline for baseline in load_registry()}
    cm3leon, parti, sd = (models[id].quantities for id in ("cm3leon-7b", "parti-20b", "sd-1.5"))
    rule = parti["compute.train_flops_6nd"].number, cm3leon["compute.train_flops_6nd"].number
    exact = parti["compute.train_flops"].number, cm3leon["compute.train_flops_causal"].number
    assert f"| 6ND | {rule[0]:.3e} | {rule[1]:.3e} | {rule[0] / rule[1]:.2f} |" in page
    assert f"| exact count | {exact[0]:.3e} | {exact[1]:.3e} | {exact[0] / exact[1]:.1f} |" in page
    flops = sd["compute.train_flops"].number
    assert f"{flops:.3e} FLOPs, {rule[1] / flops:.0f} times less" in page
    assert f"imply {100 * hours_table([models['sd-1.5']])[0].mfu:.1f} % MFU" in page
