"""Released checkpoints into our modules and back.

Nobody has given us the published file, so the checkpoints here are put together from what is known of it: the list of its
names and shapes (released_names.json.gz), weights with which the released backbone was run at small widths, and head
weights with which the released head was run at its real widths."""
import gzip, json, os, pickle, warnings
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest, torch
from torch import nn
from pcan.files import DataError
from pcan.model import RELEASED, pcan, poseconv3d
from pcan.released import HEAD, initialise, load, read, released_names, save, sizes_of, to_released
from pcan.rgbpose import PAPER, THIN, RGBPoseConv3D, Sizes
from pcan.slowonly import SlowOnly
from pcan.train import save_checkpoint
from pcan.tree import MA52, ActionTree
from test_backbones import POSE, RGB, close, load as golden, seeded, torchvision_resnet

TINY = Sizes(RGB, POSE, interaction=True)
HERE = Path(__file__).parent/'golden'
pytestmark = pytest.mark.filterwarnings('ignore:no body prototypes')

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def head_state(C_rgb=256, C_pose=64, widths=(128, 256), K=(52, 7), seed=5):
    "Random head tensors under the released names."
    g, out = torch.Generator().manual_seed(seed), {}
    for n in HEAD:
        C = C_rgb if 'rgb' in n else C_pose
        if n.endswith('avg_f'): out[f'cls_head.{n}'] = torch.randn(widths[1], K[0], generator=g); continue
        rows = {'fc': K['coarse' in n], 'fr': widths['coarse' not in n]}[n[:2]]
        out |= {f'cls_head.{n}.weight': torch.randn(rows, C, generator=g)/C**.5, f'cls_head.{n}.bias': torch.randn(rows, generator=g)}
    return out

@pytest.fixture(scope='module')
def ref(): return golden('interaction.pt') | dict(inputs=golden('backbones.pt'))

@pytest.fixture(scope='module')
def state(ref):
    "A released checkpoint at small widths; the backbone's weights are those the released backbone was run with."
    return {'backbone.'+k: v for k,v in seeded(ref['inputs']['shapes'] | ref['shapes'], 100).items()} | head_state()

def clips():
    g = torch.Generator().manual_seed(200)
    return torch.randn(2, 3, 8, 64, 64, generator=g), torch.rand(2, 28, 32, 16, 16, generator=g)

def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)

# ---- what is in the file

def test_names_and_shapes_at_full_size():
    "All 656 of them, in the order of the released state dict, and its number of parameters."
    expected = json.loads(gzip.decompress((HERE/'released_names.json.gz').read_bytes()))
    with torch.device('meta'): model, _ = pcan(RGBPoseConv3D(Sizes(interaction=True)), MA52, RELEASED)
    found = to_released(model)
    assert [[k, list(v.shape)] for k,v in found.items()] == expected and len(expected) == 656
    assert set(released_names(model).values()) == set(model.state_dict()) - {f'heads.{s}.P_b.P' for s in ('rgb', 'pose')}
    count = lambda m: sum(p.numel() for p in m.parameters())
    tables = sum(h.P_a.P.numel() for h in model.heads.values())    # parameters in the released code, buffers in ours
    assert count(model.backbone) == 37_983_296 and count(model.heads) + tables == 1_161_590
    assert count(model) + tables == 39_144_886

def test_every_size_is_read_off(state):
    full = {k: torch.empty(s, device='meta') for k,s in json.loads(gzip.decompress((HERE/'released_names.json.gz').read_bytes()))}
    assert sizes_of(full) == Sizes(interaction=True) == replace(PAPER, interaction=True)
    assert sizes_of(state) == TINY
    mma = {k: v for k,v in state.items() if 'featuredifference' not in k}
    assert sizes_of(mma) == replace(TINY, interaction=False) and sizes_of(mma, speed_ratio=2).speed_ratio == 2
    assert not sizes_of({k: v for k,v in mma.items() if '_lateral' not in k}).lateral

SIZES = [replace(TINY, interaction=False), replace(TINY, lateral=False), replace(TINY, squeeze=8, fusion_kernel=5, speed_ratio=2),
         Sizes(replace(RGB, in_channels=6, blocks=(1,2,1,1), expansion=2, inflate=(0,1,1,1), stem_kernel=(1,5,5)),
               replace(POSE, in_channels=17, base=8, blocks=(1,1,2), expansion=2, inflate=(0,0,1), stem_kernel=(3,3,3)), interaction=True),
         replace(TINY, interaction=False, speed_ratio=2)]

@pytest.mark.parametrize('sizes', SIZES)
def test_other_sizes(sizes, tmp_path):
    tree = ActionTree(('head', 'leg'), ('nod', 'tap', 'kick'), (0, 1, 1))
    model, _ = pcan(RGBPoseConv3D(sizes), tree, replace(RELEASED, width=(24, 40)))
    save(model, tmp_path/'m.pth')
    again = load(tmp_path/'m.pth', tree, None if sizes.interaction else sizes.speed_ratio)
    assert again.backbone.sizes == sizes and same(model, again)

# ---- load

def test_backbone_and_scores(state, ref):
    "Maps of the released backbone; scores by the head's formula, written out."
    model = load(state)
    assert not model.training and model.backbone.sizes == TINY
    maps = model.backbone.double()(*(x.double() for x in clips()))
    for x,name in zip(maps, ('eval_rgb', 'eval_pose')): close(x.detach(), ref[name])
    out = model.double()(*(x.double() for x in clips()))
    for (s,gamma),x in zip(dict(rgb=5., pose=1.).items(), maps):
        F = x.mean((2,3,4))
        linear = lambda n: F @ state[f'cls_head.{n}.weight'].double().T + state[f'cls_head.{n}.bias'].double()
        f, P = linear(f'fr_{s}.spatio_cl_net.cl_fc'), state[f'cls_head.fr_{s}.spatio_cl_net.avg_f'].double()
        cos = (f @ P)/f.norm(dim=1, keepdim=True)/P.norm(dim=0)
        torch.testing.assert_close(out[s].final, linear(f'fc_{s}') + gamma*cos, atol=1e-6, rtol=0)
        torch.testing.assert_close(out[s].body, linear(f'fc_{s}_coarse'), atol=1e-9, rtol=0)
        G = x.mean(2).amax((2,3))     # what prototypes are made of in training
        wb = state[f'cls_head.fr_coarse_{s}.spatio_cl_net.cl_fc.weight'].double()
        torch.testing.assert_close(out[s].feature_b, G @ wb.T + state[f'cls_head.fr_coarse_{s}.spatio_cl_net.cl_fc.bias'].double(), atol=1e-9, rtol=0)

def test_scores_of_the_released_head():
    "The released head's own outputs at its real widths, 2048 and 512, through `load`."
    r = {k: torch.from_numpy(v) for k,v in np.load(HERE/'rectify.npz').items()}
    backbone = RGBPoseConv3D(Sizes(replace(PAPER.rgb, blocks=(1,1,1,1)), replace(PAPER.pose, blocks=(1,1,1)), interaction=True))
    state = {k: v for k,v in to_released(pcan(backbone, MA52, RELEASED)[0]).items() if k.startswith('backbone.')}
    for k in {k.split('/')[1] for k in r if k.startswith('weights/')}:
        w = r.get(f'weights/{k}')
        state[f'cls_head.{k}'] = r[f'weights/{k}/u'] @ r[f'weights/{k}/v']*.05 if w is None else w
    for s in ('rgb', 'pose'):         # not in rectify.npz: they have no say in the scores
        state |= {k: v for k,v in head_state(2048, 512).items() if f'fr_coarse_{s}' in k}
    heads = load(state).heads
    with torch.no_grad(): out = dict(rgb=heads['rgb'](r['f_rgb'][...,None,None,None]), pose=heads['pose'](r['x_pose']))
    for s in out:
        torch.testing.assert_close(out[s].final, r[f'scores/{s}'], atol=2e-5, rtol=0)
        torch.testing.assert_close(out[s].body, r[f'scores/{s}_coarse'], atol=2e-5, rtol=0)

@pytest.mark.parametrize('wrap', [lambda s: s, lambda s: {'state_dict': s, 'meta': {'epoch': 3}},
                                  lambda s: {k.removeprefix('cls_head.').removeprefix('backbone.'): v for k,v in s.items()},
                                  lambda s: {k.removeprefix('cls_head.'): v for k,v in s.items()},
                                  lambda s: dict(reversed(s.items()))], ids=['bare', 'wrapped', 'no prefixes', 'one prefix', 'other order'])
@pytest.mark.parametrize('file', [False, True])
def test_spellings(state, wrap, file, tmp_path):
    source = wrap(state)
    if file: torch.save(source, path:=tmp_path/'a.pth'); source = str(path)
    got = to_released(load(source))
    assert list(got) == list(state) and all(torch.equal(got[k], v) for k,v in state.items())

def test_the_given_tensors_stay_the_givers(state):
    model, before = load(state), {k: v.clone() for k,v in state.items()}
    for v in model.state_dict().values(): v.zero_()
    assert all(torch.equal(v, before[k]) for k,v in state.items())

def test_missing_body_prototypes_are_said(state):
    with pytest.warns(UserWarning, match=r'heads.rgb.P_b.P, heads.pose.P_b.P.*Scores do not use them') as said: load(state)
    assert len(said) == 1 and said[0].filename == __file__

# ---- what is refused

@pytest.mark.parametrize('name', ['backbone.rgb_path.conv1.conv.weight', 'backbone.pose_path.layer2.3.conv2.bn.running_var', 'cls_head.fc_rgb.weight',
                                  'backbone.rgb_path.layer3_lateral.conv.weight', 'backbone.featuredifference3.skt_cross_attn.fc.bias',
                                  'backbone.featuredifference2.conv2.weight', 'backbone.rgb_path.layer3.0.conv1.conv.weight',
                                  'cls_head.fr_pose.spatio_cl_net.avg_f', 'cls_head.fc_pose_coarse.bias', 'backbone.pose_path.layer3.2.conv1.bn.num_batches_tracked'])
def test_missing(state, name):
    with pytest.raises(DataError, match=f'missing: {name}'): load({k: v for k,v in state.items() if k != name})

@pytest.mark.parametrize('name', ['cls_head.fc_audio.weight', 'backbone.rgb_path.layer2.4.conv1.conv.weight', 'momentum', 'backbone.to_rgb.0.weight'])
def test_extra(state, name):
    with pytest.raises(DataError, match=f'(not expected|missing): .*{name.removesuffix(".conv1.conv.weight")}'): load(state | {name: torch.zeros(2)})

@pytest.mark.parametrize('name,shape', [('cls_head.fc_pose.weight', (52, 63)), ('cls_head.fr_rgb.spatio_cl_net.avg_f', (52, 256)),
                                        ('backbone.pose_path.layer1_lateral.bn.bias', (5,)), ('backbone.rgb_path.layer4.1.conv1.conv.weight', (64, 256, 1, 1, 1))])
def test_wrong_shape(state, name, shape):
    with pytest.raises(DataError) as e: load(state | {name: torch.zeros(shape)})
    assert f'{name} found {shape}, expected {tuple(state[name].shape)}' in str(e.value)

def test_other_classes_and_twice(state):
    with pytest.raises(DataError, match='found 52 actions and 7 bodies; expected 2 and 1'): load(state, ActionTree(('a',), ('b', 'c'), (0, 0)))
    with pytest.raises(DataError, match='found tensors twice.*fc_rgb.bias'): load(state | {'fc_rgb.bias': torch.zeros(52)})
    with pytest.raises(DataError, match='speed ratio 4; expected the 2'): load(state, speed_ratio=2)
    with pytest.raises(DataError, match='found 3 stages in backbone.rgb_path'): load({k: v for k,v in state.items() if 'rgb_path.layer4' not in k})

class Evil:
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return os.system, (f'touch {self.mark}',)

class Plain: pass

@pytest.mark.parametrize('thing,what', [(Evil, 'system'), (lambda mark: Plain(), 'Plain')])
def test_objects_are_refused(state, thing, what, tmp_path):
    torch.save({'state_dict': state, 'message_hub': thing(mark:=tmp_path/'ran')}, tmp_path/'a.pth')
    with pytest.raises(DataError, match=f'refused. It holds .*{what}; expected tensors.*weights_only=False'): load(tmp_path/'a.pth')
    assert not mark.exists()

def test_not_a_checkpoint(tmp_path):
    with pytest.raises(DataError, match='no such file'): load(tmp_path/'none.pth')
    for content in (b'', b'hello world', pickle.dumps(3, protocol=2)):
        (tmp_path/'b.pth').write_bytes(content)
        with pytest.raises(DataError): load(tmp_path/'b.pth')
    torch.save({'state_dict': {'x': torch.zeros(2)}}, tmp_path/'c.pth')
    with pytest.raises(DataError, match='missing: cls_head.fc_rgb.weight.*It begins with cls_head.x'): load(tmp_path/'c.pth')
    data = (tmp_path/'c.pth').read_bytes(); (tmp_path/'d.pth').write_bytes(data[:len(data)//2])
    with pytest.raises(DataError, match='not a readable checkpoint'): load(tmp_path/'d.pth')
    with pytest.raises(DataError, match='found model, epoch; expected named tensors'): read({'model': {}, 'epoch': 3})

# ---- save

def test_round_trip(state, tmp_path):
    "Bit for bit, body prototypes included, and a loaded state dict comes out in its names and order."
    model = load(state)
    save(model, tmp_path/'m.pth', meta={'epoch': 7})
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        again = load(tmp_path/'m.pth')
    assert same(model, again)
    written = torch.load(tmp_path/'m.pth', weights_only=True)
    assert list(written['state_dict']) == list(state) and all(torch.equal(written['state_dict'][k], v) for k,v in state.items())
    assert written['meta'] == {'epoch': 7} and [p.name for p in tmp_path.iterdir()] == ['m.pth']

def test_only_what_can_be_read_back_is_saved(tmp_path):
    released = lambda sizes: pcan(RGBPoseConv3D(sizes), MA52, RELEASED)[0]
    for model,match in ((released(THIN), 'does not say what this network is'), (pcan(RGBPoseConv3D(TINY), MA52)[0], 'heads of the released reading'),
                        (poseconv3d(RGBPoseConv3D(TINY), MA52)[0], 'heads of the released reading')):
        with pytest.raises(ValueError, match=match): save(model, tmp_path/'m.pth')
    assert not list(tmp_path.iterdir())
    save(released(replace(TINY, rgb=replace(RGB, zero_init=False))), tmp_path/'m.pth')     # a way of starting is no size

# ---- initialise

@pytest.fixture
def model():
    torch.manual_seed(3)
    return pcan(RGBPoseConv3D(TINY), MA52, RELEASED)[0]

def test_from_mmaction2(model, state, tmp_path):
    "RGBPoseConv3D with another head: the backbone is taken, the interaction and our heads are left as they are."
    before = {k: v.clone() for k,v in model.state_dict().items()}
    init = {k: v for k,v in state.items() if k.startswith('backbone.') and 'difference' not in k} | {'cls_head.fc_rgb.weight': torch.zeros(60, 256)}
    torch.save({'state_dict': init, 'meta': {}}, tmp_path/'init.pth')
    said = initialise(model, tmp_path/'init.pth')
    assert said == dict(filled=['rgb', 'pose', 'to_rgb', 'to_pose'], left=['interact', 'heads.rgb', 'heads.pose'])
    after = to_released(model)
    assert all(torch.equal(after[k], v) for k,v in init.items() if k in after and k.startswith('backbone.'))
    for k,v in model.state_dict().items():
        if k.startswith(('heads.', 'backbone.interact')): assert torch.equal(v, before[k])

def test_from_released_backbone(model, state):
    said = initialise(model.backbone, {k.removeprefix('backbone.'): v for k,v in state.items() if k.startswith('backbone.')})
    assert said == dict(filled=['rgb', 'pose', 'to_rgb', 'to_pose', 'interact'], left=[])

def one_stream(name):
    path = getattr(TINY, name)
    return poseconv3d(SlowOnly(path), MA52, stream=name)[0]

@pytest.mark.parametrize('kind', ['mmaction2', 'ours', 'run'])
def test_from_single_streams(model, kind, tmp_path):
    "Two SlowOnly networks; without laterals' weight and interaction the joined network is these two."
    ones, files = {s: one_stream(s) for s in ('rgb', 'pose')}, {}
    for s,m in ones.items():
        if kind == 'run':
            save_checkpoint(files.setdefault(s, tmp_path/f'{s}.safetensors'), m, torch.optim.SGD(m.parameters(), .1, momentum=.9), [])
        else: files[s] = {k if kind == 'ours' else k.replace(f'heads.{s}.W1', 'cls_head.fc_cls'): v for k,v in m.state_dict().items()}
    said = initialise(model, **files)
    assert said == dict(filled=['rgb', 'pose'], left=['to_rgb', 'to_pose', 'interact', 'heads.rgb', 'heads.pose'])
    for m in model.backbone.interact: m.eval(); [(nn.init.zeros_(c.weight), nn.init.zeros_(c.bias)) for c in (m.rgb_out, m.pose_out)]
    with torch.no_grad():
        for x,m,clip in zip(model.eval().backbone(*clips()), ones.values(), clips()): close(x, m.eval().backbone(clip), 1e-5)

def test_from_photographs():
    "torchvision's ResNet-50, inflated; the other pathway is left."
    net = RGBPoseConv3D(replace(TINY, rgb=PAPER.rgb, pose=replace(POSE, base=4), interaction=False))
    image_net, pose = torchvision_resnet('resnet50'), {k: v.clone() for k,v in net.pose.state_dict().items()}
    said = initialise(net, rgb=image_net.state_dict())
    assert said == dict(filled=['rgb'], left=['pose', 'to_rgb', 'to_pose'])
    assert torch.equal(net.rgb.layer3[1].conv1.conv.weight[:,:,1,0,0], image_net.layer3[1].conv1.weight[...,0,0])
    assert all(torch.equal(v, pose[k]) for k,v in net.pose.state_dict().items())

def test_what_does_not_fit_changes_nothing(model):
    before = {k: v.clone() for k,v in model.state_dict().items()}
    rgb, coco = SlowOnly(RGB).state_dict(), SlowOnly(replace(POSE, in_channels=17)).state_dict()
    both = to_released(pcan(RGBPoseConv3D(replace(TINY, pose=replace(POSE, in_channels=17))), MA52, RELEASED)[0])
    for call,match in ((lambda: initialise(model, rgb=rgb, pose=coco), r'conv1.conv.weight found \(4, 17, 1, 7, 7\), expected \(4, 28, 1, 7, 7\)'),
                       (lambda: initialise(model, both), r'pose.conv1.conv.weight found \(4, 17, 1, 7, 7\), expected \(4, 28, 1, 7, 7\)'),
                       (lambda: initialise(model, rgb), 'does not fit this RGBPoseConv3D.*missing'),
                       (lambda: initialise(model, pose=rgb), 'pose state does not fit'),
                       (lambda: initialise(model, both, rgb=rgb), 'give one checkpoint of both'),
                       (lambda: initialise(model), 'give one checkpoint of both'),
                       (lambda: initialise(model.heads['rgb'], both), 'found a PCANHead; expected an RGBPoseConv3D'),
                       (lambda: initialise(RGBPoseConv3D(replace(TINY, interaction=False)), both), 'not expected: interact.0')):
        with pytest.raises(ValueError, match=match): call()
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())
