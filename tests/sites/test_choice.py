"""What a user may say about the sites, and what is refused by name."""

import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import torchvision
import yaml
from torch import nn

from mp_lightning import ConfigurationError, MetaPerturbCallback, NamedPhi, SiteError
from mp_lightning.backbones import build_backbone
from mp_lightning.perturbation import initial_phi
from mp_lightning.sites import SitePlan, attach, attachment_of, choose_sites, find_activations, find_sites
from mp_lightning.sites.discovery import _deepest


@pytest.fixture(scope="module")
def resnet():
    return torchvision.models.resnet18(num_classes=3)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = F.gelu(self.second(x)).relu()
        return self.head(F.relu(self.head.weight.new_ones(1) * x.mean((2, 3))))


@pytest.mark.parametrize(
    ("sites", "names"),
    [
        ("layer1.0.relu", ["layer1.0.relu"]),
        ("layer4.*", ["layer4.0.relu", "layer4.1.relu"]),
        (["layer1.1.relu", "layer4.*"], ["layer1.1.relu", "layer4.0.relu", "layer4.1.relu"]),
        (lambda site: site.channels == 512, ["layer4.0.relu", "layer4.1.relu"]),
        (torchvision.models.resnet.BasicBlock, [f"layer{i}.{j}.relu" for i in range(1, 5) for j in range(2)]),
        ("relu", ["relu"]),  # the stem's, which no rule would choose
    ],
)
def test_names_patterns_classes_and_conditions(resnet, sites, names):
    plan = choose_sites(resnet, sites)
    assert plan.names == names
    found = {site.name: site for site in find_sites(resnet)}
    assert all(site == found.get(site.name, site) for site in plan)


def convolution(channels=2):
    return nn.Sequential(nn.Conv2d(channels, 2, 1), nn.BatchNorm2d(2), nn.ReLU())


@pytest.mark.parametrize(
    ("share", "names"), [(1, "01234"), (0.5, "234"), (0.4, "34"), (0.2, "4"), (0.01, "4"), (1e-4, "4"), (0.6, "234")]
)
def test_a_share_means_the_last_sites_rounded_up(share, names):
    model = nn.Sequential(*[convolution() for _ in range(5)])
    assert [name[0] for name in choose_sites(model, share).names] == list(names)
    assert choose_sites(model, share) == find_sites(model, share=share)


@pytest.mark.parametrize("count", range(1, 41))
def test_a_share_that_is_a_fraction_takes_no_site_more_than_it_says(count):
    sites = list(find_sites(nn.Sequential(*[convolution() for _ in range(count)])))
    for tenths in range(1, 11):
        assert len(_deepest(sites, [""], tenths / 10)) == -(-tenths * count // 10)


def test_a_share_is_taken_of_each_network():
    class Two(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.student = nn.Sequential(*[convolution() for _ in range(4)])
            self.critic = nn.Sequential(*[convolution() for _ in range(2)])

    assert choose_sites(Two(), 0.5).names == ["student.2.2", "student.3.2", "critic.1.2"]
    assert choose_sites(Two(), 0.5, target="student").names == ["student.2.2", "student.3.2"]
    # Names may be those within the target.
    assert choose_sites(Two(), ["2.*", "student.3.*"], target="student").names == ["student.2.2", "student.3.2"]


def test_phi_comes_with_a_share_of_the_sites_that_others_can_replace(resnet):
    deeper = NamedPhi(initial_phi(0), "deeper", share_of_sites=0.5)
    model = copy.deepcopy(resnet)
    attachment = attach(model, deeper)
    assert attachment.plan.names == [f"layer{i}.{j}.relu" for i in (3, 4) for j in range(2)]
    attachment.detach()
    everywhere = attach(model, deeper, sites=1)
    assert everywhere.plan == find_sites(model) and everywhere.channel_norm == attachment.channel_norm
    everywhere.detach()
    assert MetaPerturbCallback(deeper, sites=0.25).attach(model).plan.names == ["layer4.0.relu", "layer4.1.relu"]


def test_leaving_the_first_sites_out_does_not_change_the_norm_of_the_others():
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64), nn.ReLU(), convolution(64))
    assert attach(model, sites=0.5).channel_norm == 64


@pytest.mark.parametrize("share", [0, -0.5, 1.5, float("nan"), 2])
def test_a_share_that_is_none_is_refused(resnet, share):
    for use in (lambda: choose_sites(resnet, share), lambda: MetaPerturbCallback(sites=share)):
        with pytest.raises(
            ConfigurationError, match=f"sites={share} cannot be used; give a number above 0 and at most"
        ):
            use()


def test_a_class_of_activations_means_all_its_calls(resnet):
    plan = choose_sites(resnet, nn.ReLU)
    assert len(plan) == 1 + 2 * 8
    assert {site.channels for site in plan} == {64, 128, 256, 512}


def test_a_function_means_its_calls_on_maps_alone():
    model = Functional()
    assert len(find_activations(model)) == 3  # and not that of the features
    assert [site.call for site in choose_sites(model, F.relu)] == [0, 2]
    assert [site.call for site in choose_sites(model, F.gelu)] == [1]
    plan = choose_sites(model, [F.gelu, lambda site: site.call == 0])
    assert [site.call for site in plan] == [0, 1]


def test_chosen_sites_are_perturbed_and_the_norm_stays_that_of_the_default_plan(resnet):
    model = copy.deepcopy(resnet)
    attachment = attach(model, sites="layer1.*")
    assert attachment.plan.names == ["layer1.0.relu", "layer1.1.relu"]
    assert attachment.channel_norm == 512
    assert attach(model, sites="layer1.*") is attachment


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ("layer9.*", r"sites=layer9\.\*: no activation of ResNet fits; those that can be sites are relu, layer1\.0"),
        (["layer1.*", "*.0.relu"], r"site 'layer1\.0\.relu' is reached twice, by 'layer1\.\*' and by '\*\.0\.relu'"),
        (nn.GELU, "sites=GELU: no activation of ResNet fits"),
        (3j, "sites=3j cannot be used; give a SitePlan"),
        ([["layer1.*"]], r"sites=\['layer1\.\*'\] cannot be used; give a SitePlan"),
        (nn.ReLU(), r"sites=ReLU\(\) cannot be used; give a SitePlan"),
        ("no_such.yaml", r"plan 'no_such\.yaml' cannot be read"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_the_model_left_alone(resnet, sites, message):
    model = copy.deepcopy(resnet)
    with pytest.raises(SiteError, match=message) as caught:
        attach(model, sites=sites)
    assert "\n" not in str(caught.value)
    assert attachment_of(model) is None
    assert not any(module._forward_pre_hooks for module in model.modules())


class Distillation(nn.Module):
    def __init__(self):
        super().__init__()
        self.student = torchvision.models.resnet18(num_classes=3)
        self.teacher = torchvision.models.resnet18(num_classes=3)

    def forward(self, x):
        return self.student(x) - self.teacher(x)


def test_target_names_the_part_that_counts():
    model = Distillation()
    assert len(find_sites(model)) == 16
    attachment = attach(model, target="student", sites=1)
    assert {name.split(".")[0] for name in attachment.plan.names} == {"student"}
    assert len(attachment.plan) == 8
    with pytest.raises(ConfigurationError, match="attached already, at other sites"):
        attach(model, target="teacher")
    with pytest.raises(SiteError, match="target='pupil' is no part of Distillation; its parts are student, teacher"):
        attach(Distillation(), target="pupil")
    with pytest.raises(SiteError, match=r"site 'teacher\..*' is outside of target 'student'"):
        choose_sites(model, find_sites(model), target="student")


def test_a_plan_goes_through_a_file_that_is_edited(resnet, tmp_path):
    path = tmp_path / "plans" / "plan.yaml"
    plan = find_sites(resnet)
    plan.save(path)
    assert SitePlan.load(path) == plan
    data = yaml.safe_load(path.read_text())
    del data["sites"][1:]
    path.write_text(yaml.safe_dump(data))
    assert MetaPerturbCallback(sites=path).sites.names == ["layer1.0.relu"]
    assert attach(copy.deepcopy(resnet), sites=str(path)).plan.names == ["layer1.0.relu"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda site: site.pop("scope"), "site 'layer1.0.relu' of the plan has no key 'scope'"),
        (lambda site: site.update(chanels=3), "site 'layer1.0.relu' of the plan has an unknown key 'chanels'"),
        (lambda site: site.update(channels="many"), "site 'layer1.0.relu' of the plan has channels='many'"),
        (
            lambda site: site.update(layout="sideways"),
            "layout='sideways'; give 'channels first' or 'channels last'",
        ),
        (lambda site: site.update(scope="layer1.7"), "ResNet has no module 'layer1.7'"),
        (lambda site: site.update(call=5), "site 'layer1.0.relu' does not fit: 'layer1.0' has no such activation call"),
        (lambda site: site.update(channels=65), "it has 64 channels .*, and 65 .* in the plan; the model was changed"),
    ],
)
def test_an_edited_plan_that_does_not_fit_names_the_site(resnet, tmp_path, change, message):
    path = tmp_path / "plan.yaml"
    data = find_sites(resnet).to_dict()
    change(data["sites"][0])
    path.write_text(yaml.safe_dump(data))
    model = copy.deepcopy(resnet)
    with pytest.raises(SiteError, match=message):
        attach(model, sites=path)
    assert attachment_of(model) is None


@pytest.mark.parametrize(
    "content", ["a: [", "- 1", "", "version: 9\nsites: []", "version: 1\nsites:\n  - 3", "2020-13-45"]
)
def test_a_file_that_is_no_plan_is_refused_by_name(tmp_path, content):
    path = tmp_path / "plan.yaml"
    path.write_text(content)
    with pytest.raises(SiteError, match=r"plan '.*plan\.yaml'.* "):
        MetaPerturbCallback(sites=path)


def test_a_model_that_was_changed_after_its_plan_was_made(resnet):
    plan = find_sites(resnet)
    changed = torchvision.models.wide_resnet50_2(num_classes=3)
    with pytest.raises(SiteError, match="does not fit"):
        attach(changed, sites=plan)
    model = copy.deepcopy(resnet)
    attachment = attach(model, sites=plan)
    model.layer1[0].bn2 = nn.Identity()
    model.layer1[0].conv2 = nn.Conv2d(64, 32, 3, padding=1)
    model.layer1[0].downsample = nn.Conv2d(64, 32, 1)
    with pytest.raises(SiteError, match=r"site 'layer1\.0\.relu' got a tensor of shape .*expected \(B, 64, H, W\)"):
        model(torch.rand(2, 3, 32, 32))
    assert attachment.depth == 0


class HoldsTraced(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.jit.trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.rand(1, 3, 8, 8))

    def forward(self, x):
        return self.net(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())), "it was scripted"),
        (HoldsTraced, "its part 'net' was scripted"),
        (
            lambda: torch.export.export(
                nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (torch.rand(1, 3, 8, 8),)
            ).module(),
            "it was scripted, traced or exported",
        ),
    ],
)
def test_a_model_that_can_no_longer_be_changed_is_refused(make, what):
    with pytest.raises(SiteError, match=f"{what}.*attach first"):
        attach(make())


@pytest.mark.parametrize("find", [find_sites, find_activations])
def test_a_target_that_is_no_part_is_refused(find):
    with pytest.raises(SiteError, match=r"target='nope' is no part of ConvNet; its parts are conv_layers, "):
        find(build_backbone("conv4", 10), "nope")
