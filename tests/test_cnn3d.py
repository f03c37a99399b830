"""C3D and SlowFast against mmaction2's: same weights and inputs, same numbers; I3D against its definition.

The reference was run once, in float32, on small networks with seeded weights and inputs, which `seeded` and `torch.randn` draw again.
tests/golden/cnn3d.pt keeps names and shapes of its weights and what came out."""
import re
from math import prod
from pathlib import Path
import pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from pcan.cnn3d import C3D, I3D, SlowFast
from pcan.slowonly import image_models

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(scope='module')
def golden(): return torch.load(Path(__file__).parent/'golden/cnn3d.pt', weights_only=True)

def seeded(shapes, seed):
    "The weights the reference was run with: drawn tensor by tensor in the order of its state dict."
    g, out = torch.Generator().manual_seed(seed), {}
    for k,s in shapes.items():
        match k.rsplit('.', 1)[1]:
            case 'num_batches_tracked': out[k] = torch.tensor(0)
            case 'weight' if len(s) > 1: out[k] = torch.randn(s, generator=g)/prod(s[1:])**.5
            case 'weight': out[k] = .7 + .6*torch.rand(s, generator=g)
            case 'running_var': out[k] = .5 + torch.rand(s, generator=g)
            case _: out[k] = .1*torch.randn(s, generator=g)
    return out

def randn(seed, *shape): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

def close(a, b, tol=1e-5): torch.testing.assert_close(a, b, atol=tol, rtol=0)

@pytest.mark.parametrize('name,seed', [('c3d', 48), ('slowfast', 11)])
def test_draws(golden, name, seed):
    "If this fails, torch draws other random numbers than it did, and the tests below say nothing about the networks."
    state = seeded(golden[name]['shapes'], seed)
    for k,v in golden[name]['drawn'].items(): assert abs(state[k].flatten()[0] - v) < 1e-6

# ---- the reference

def test_c3d(golden):
    want = golden['c3d']
    state = {re.sub(r'^(conv\d.)\.conv', r'convs.\1', k): v for k,v in seeded(want['shapes'], 48).items()}
    net = C3D(widths=(4,8,16,32,32), fc=24).eval()
    net.load_state_dict(state | {'fc.weight': net.fc.weight, 'fc.bias': net.fc.bias})                # the reference's run has no classifier
    x = randn(49, 1, 3, 16, 112, 112).half().float()
    with torch.no_grad(): close(net.convs(x), want['pool5']); close(net.features(x), want['out'])

RENAME = {'slow_path.conv1_lateral': 'laterals.0', **{f'slow_path.layer{i}_lateral': f'laterals.{i}' for i in (1,2,3)},
          'slow_path': 'slow', 'fast_path': 'fast'}

def ours(name):
    "The reference's name of a tensor or module as ours."
    old = next(o for o in RENAME if name.startswith(o))
    return re.sub(r'^(laterals\.\d)\.conv', r'\1', RENAME[old] + name.removeprefix(old))

def test_slowfast(golden):
    want, seen = golden['slowfast'], {}
    net = SlowFast(K=7, base=8, blocks=(1,1,1,1)).eval()
    net.load_state_dict({ours(k): v for k,v in seeded(want['shapes'], 11).items()} | seeded({'fc.weight': (7, 288), 'fc.bias': (7,)}, 13))
    for k in want['acts']: net.get_submodule(ours(k)).register_forward_hook(lambda m,i,o,k=k: seen.__setitem__(k, o))
    x = randn(12, 1, 3, 32, 32, 32)
    with torch.no_grad(): (slow, fast), logits = net.maps(x), net(x)
    close(slow, want['slow']); close(fast, want['fast']); close(logits, want['logits'])
    assert len(seen) == 6
    for k,v in want['acts'].items(): close(seen[k], v)

def i3d_by_hand(s, x, plan):
    "I3D from its weights alone, in evaluation mode."
    def conv(k, x, stride=1):
        w = s[k+'.conv.weight']
        x = F.conv3d(x, w, None, stride, tuple(n//2 for n in w.shape[2:]))
        return F.batch_norm(x, s[k+'.bn.running_mean'], s[k+'.bn.running_var'], s[k+'.bn.weight'], s[k+'.bn.bias'])
    x = F.max_pool3d(conv('conv1', x, 2).relu(), (1,3,3), 2, (0,1,1))
    for i,blocks in enumerate(plan, 1):
        for j,inflated in enumerate(blocks):
            k, stride = f'layer{i}.{j}', (1,2,2) if i > 1 and j == 0 else 1
            assert s[k+'.conv1.conv.weight'].shape[2:] == (3 if inflated else 1, 1, 1)
            y = conv(k+'.conv2', conv(k+'.conv1', x).relu(), stride).relu()
            x = (conv(k+'.conv3', y) + (x if j else conv(k+'.downsample', x, stride))).relu()
        if i == 1: x = F.max_pool3d(x, (2,1,1))
    return x.mean((2,3,4)) @ s['fc.weight'].T + s['fc.bias']

def test_i3d():
    "The default plan of blocks, on a narrow network."
    net = I3D(base=4).double()
    plan = ((1,1,1), (1,0,1,0), (1,0,1,0,1,0), (0,1,0))
    x = randn(0, 2, 3, 16, 48, 48).double()
    net.train()(x); net.eval()
    with torch.no_grad(): close(net(x), i3d_by_hand(net.state_dict(), x, plan), 1e-12)

# ---- sizes

@pytest.mark.parametrize('make,T,side,total,gflops', [(C3D, 16, 112, 78_208_820, 77.094), (I3D, 32, 224, 27_330_420, 66.255), (I3D, 32, 256, 27_330_420, 86.537),
                                                      (SlowFast, 32, 224, 33_677_148, 55.276), (SlowFast, 32, 256, 33_677_148, 72.197)])
def test_paper_size(make, T, side, total, gflops):
    with torch.device('meta'), FlopCounterMode(display=False) as flops:
        net = make().eval()
        assert net(torch.empty(1, 3, T, side, side)).shape == (1, 52)
    assert sum(p.numel() for p in net.parameters()) == total and round(flops.get_total_flops()/1e9, 3) == gflops

def test_parts_of_slowfast():
    "Laterals add 16, 64, 128 and 256 channels; the head reads 2048 + 256."
    with torch.device('meta'): net = SlowFast()
    assert [m.out_channels for m in net.laterals] == [16, 64, 128, 256] and net.fc.in_features == 2304
    assert [s[0].conv1.conv.in_channels for s in net.slow.stages()] == [64+16, 256+64, 512+128, 1024+256]

def test_first_weights():
    torch.manual_seed(0)
    net = C3D(widths=(16,16,32,32,32), fc=256)
    close(torch.stack([m.weight.std() for m in (net.fc6, net.fc7, net.fc)]), torch.tensor([.005, .005, .01]), 5e-4)
    close(net.convs.conv3a.weight.std(), torch.tensor((2/(32*27))**.5), 2e-3)
    assert not any(p.any() for k,p in net.named_parameters() if k.endswith('bias'))
    gammas = lambda net: [p for k,p in net.named_parameters() if k.endswith('conv3.bn.weight')]
    assert all((p == 1).all() for p in gammas(I3D(base=4))) and not any(p.any() for p in gammas(SlowFast(base=8)))
    assert abs(SlowFast(base=16).fc.weight.std() - .01) < 5e-4 and abs(I3D(base=16).fc.weight.std() - .01) < 5e-4

# ---- the thin ones

def thin(make, T, side): return make(**make.thin | (dict(frames=T, size=side) if make is C3D else {}))

every = pytest.mark.parametrize('make', [C3D, I3D, SlowFast])

@every
@pytest.mark.parametrize('T,side', [(16, 64), (8, 64), (8, 32), (4, 32)])
def test_thin(make, T, side):
    "Every weight gets a gradient; the state survives a copy; channels last changes nothing but rounding."
    torch.manual_seed(0)
    x, net = torch.randn(2, 6, T, side, side), thin(make, T, side).train()
    z = net(x)
    z.logsumexp(1).sum().backward()
    assert z.shape == (2, 52) and all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters())
    assert 1e5 < sum(p.numel() for p in net.parameters()) < 1e6
    copy = thin(make, T, side)
    copy.load_state_dict(net.state_dict())
    with torch.no_grad():
        z = net.eval()(x)
        assert torch.equal(copy.eval()(x), z)
        close(copy.to(memory_format=torch.channels_last_3d)(x), z, 1e-4)

@every
def test_learns(make):
    "Four clips of noise by heart in sixty steps."
    torch.manual_seed(0)
    net, x, y = thin(make, 8, 64), torch.randn(4, 6, 8, 64, 64), torch.arange(4)
    opt = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(60):
        opt.zero_grad(); F.cross_entropy(net.train()(x), y).backward(); opt.step()
    with torch.no_grad(): assert (net.eval()(x).argmax(1) == y).all()

@every
def test_wrong_input(make):
    net = thin(make, 8, 64)
    with pytest.raises(ValueError, match=r'shape \(2, 3, 8, 64, 64\), expected'): net(torch.randn(2, 3, 8, 64, 64))
    with pytest.raises(ValueError, match=r'shape \(6, 8, 64, 64\), expected'): net(torch.randn(6, 8, 64, 64))
    if make is I3D: return                                                       # takes any length
    with pytest.raises(ValueError, match=r'shape \(2, 6, 10, 64, 64\)'): net(torch.randn(2, 6, 10, 64, 64))

def test_wrong_sizes():
    with pytest.raises(ValueError, match='alpha=3.*multiple of alpha'): SlowFast(tau=8, alpha=3)
    with pytest.raises(ValueError, match='beta_inv=7'): SlowFast(beta_inv=7)

# ---- photographs

def test_photos():
    "The weights of ResNet-50 arrive in place, each kernel's taps sum to the image network's, and the classifier stays."
    torch.manual_seed(0)
    photos, net = image_models().resnet50().state_dict(), I3D()
    fc = net.fc.weight.clone()
    state = net.load_photos(photos).state_dict()
    assert torch.equal(state['fc.weight'], fc) and len(state) == len(photos)
    assert torch.equal(state['layer3.5.conv2.bn.running_var'], photos['layer3.5.bn2.running_var'])
    for ours,theirs in (('conv1.conv', 'conv1'), ('layer2.2.conv1.conv', 'layer2.2.conv1'), ('layer4.0.downsample.conv', 'layer4.0.downsample.0')):
        close(state[ours+'.weight'].sum(2), photos[theirs+'.weight'], 1e-6)
    taps = net.load_photos(photos, 'centre').conv1.conv.weight
    assert torch.equal(taps[:,:,2], photos['conv1.weight']) and not taps[:,:,[0,1,3,4]].any()

@pytest.mark.parametrize('name,match', [('resnet18', 'missing: layer1.0.conv3.conv.weight'), ('resnet101', 'not expected: layer3.6'),
                                        ('wide_resnet50_2', r'layer1.0.conv1.conv.weight found \(128, 64, 3, 1, 1\), expected \(64, 64, 3, 1, 1\)')])
def test_other_photo_networks_are_refused(name, match):
    with torch.device('meta'): net, state = I3D(), getattr(image_models(), name)().state_dict()
    with pytest.raises(ValueError, match=match): net.load_photos(state)

# ---- on real tensors

@pytest.mark.slow
@pytest.mark.parametrize('make,T,side', [(C3D, 16, 112), (I3D, 32, 224), (SlowFast, 32, 224)])
def test_paper_size_trains(make, T, side):
    torch.manual_seed(0)
    net = make().train()
    for k,p in net.named_parameters():
        if k.endswith('conv3.bn.weight'): nn.init.ones_(p)           # SlowFast's blocks start as their shortcuts, which pass nothing back
    F.cross_entropy(net(torch.randn(1, 3, T, side, side)), torch.tensor([3])).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters())
