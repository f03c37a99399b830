"""TSN, TSM, TIN and MANet against the reference implementation (mmaction2 1.x, and MANet's own code): same weights and inputs, same numbers.

The reference was run once, in float32, on small seeded tensors; `normal` draws the inputs again, tests/golden/frames.npz keeps what came out. TIN's shift exists there
as a CUDA kernel only, so its numbers come from a plain loop that says what the kernel says."""
from copy import deepcopy
from math import log
from pathlib import Path
import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from pcan.frames import MANet, MANetLoss, TIN, TSM, TSN, Gate, Interlace, Shift, interlace, label_vectors, move, shift
from pcan.model import Scores
from pcan.slowonly import image_models
from pcan.tree import MA52

TOL, NETS = 1e-5, (TSN, TSM, TIN, MANet)
named = pytest.mark.parametrize('net', NETS, ids=lambda n: n.__name__)

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(scope='module')
def golden():
    with np.load(Path(__file__).parent/'golden'/'frames.npz') as f: return {k: torch.from_numpy(v) for k,v in f.items()}

def normal(seed, *shape): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
def close(ours, theirs, tol=TOL): torch.testing.assert_close(ours, theirs, atol=tol, rtol=tol)
def clips(x, T): return x.view(-1, T, *x.shape[1:]).transpose(1, 2)          # frames in the batch (B*T,C,H,W) -> (B,C,T,H,W)
def frames(x): return x.transpose(1, 2).flatten(0, 1)                        # and back
def scores(out): return out if isinstance(out, tuple) else (out,)
def make(net, T=8, **kw): return net(**(dict(frames=T) if net is TIN else {}), **net.thin | kw)

def test_draws(golden):
    "If this fails, torch draws other random numbers than it did, and the tests below say nothing."
    for seed,first in golden['drawn'].tolist(): assert abs(normal(int(seed), 64)[0] - first) < 1e-6

# ---- the parts

@pytest.mark.parametrize('div', [8, 4, 3])
def test_shift(golden, div):
    x = normal(1, 16, 16, 3, 5)
    assert torch.equal(frames(shift(clips(x, 8), div)), golden[f'tsm/out_div{div}'])

def test_shift_of_odd_sizes(golden):
    assert torch.equal(frames(shift(clips(normal(2, 6, 10, 2, 2), 3), 4)), golden['tsm/out_c10_t3_div4'])

def test_move_beyond_the_ends():
    x = normal(0, 1, 2, 3, 1, 1)
    for d in (-5, -3, 3, 5): assert not move(x, d).any()
    assert torch.equal(move(x, 2)[:,:,2], x[:,:,0]) and not shift(x[:,:,:1], 2).any()

def test_interlace_whole(golden):
    x = normal(3, 2, 8, 8, 6).transpose(1, 2)[...,None]                       # (N,T,C,HW) -> (N,C,T,HW,1)
    y = interlace(x, golden['tin/shift_s'].float(), reach=8)
    assert torch.equal(y[...,0].transpose(1, 2), golden['tin/shift_out'])

def test_interlace_between(golden):
    o = golden['tin/sampler_offset'].clone().requires_grad_()
    y = interlace(normal(5, 2, 8, 8, 2, 3).transpose(1, 2), o).transpose(1, 2)
    (y*normal(7, 2, 8, 8, 2, 3)).sum().backward()
    close(y.detach(), golden['tin/sampler_out'])
    close(o.grad, golden['tin/sampler_grad_offset'])

def given(golden, prefix, names): # the reference's weights under our names
    return {ours: golden[f'{prefix}/{theirs}'] for theirs,ours in names.items()}

def test_interlace_block(golden):
    names = {f'{a}_net.{b}': c for a,b,c in (('offset','conv','offset.0'), ('offset','fc1','offset.2'), ('offset','fc2','offset.4'), ('weight','conv','weight'))}
    names = {f'{k}.{p}': f'{v}.{p}' for k,v in names.items() for p in ('weight', 'bias')}
    block, x = Interlace(32, 8), normal(9, 16, 32, 3, 4).requires_grad_()
    block.load_state_dict(given(golden, 'tin/block_sd', names))
    y = frames(block(clips(x, 8)))
    ((y*normal(10, 16, 32, 3, 4)).sum()/y.numel()).backward()
    close(y.detach(), golden['tin/block_out']); close(x.grad, golden['tin/block_grad_in'])
    norms = given(golden, 'tin/block_grad_norm', names)
    for k,p in block.named_parameters(): close(p.grad.norm(), norms[k])

def test_gated_shift(golden):
    names = {'fcce.0.weight': 'gate.squeeze.weight', 'fcce.2.weight': 'gate.excite.weight', 'net.weight': 'conv.weight'}
    block, x = nn.Sequential(), normal(51, 8, 16, 3, 3).requires_grad_()
    for name,m in dict(gate=Gate(16), shift=Shift(8), conv=nn.Conv3d(16, 8, 1, bias=False)).items(): block.add_module(name, m)
    block.load_state_dict({k: v.view(block.state_dict()[k].shape) for k,v in given(golden, 'manet/block_sd', names).items()})
    close(block.gate.gate(clips(x, 4)).detach().transpose(1, 2).flatten(0, 1), golden['manet/se_gate'])
    y = frames(block(clips(x, 4)))
    ((y*normal(52, 8, 8, 3, 3)).sum()/y.numel()).backward()
    close(y.detach(), golden['manet/block_out']); close(x.grad, golden['manet/block_grad_in'])
    norms = given(golden, 'manet/block_grad_norm', names)
    for k,p in block.named_parameters(): close(p.grad.norm(), norms[k])

def manet_head():
    "MANet without its ResNet: 12 channels, 7 actions, and the weights that the reference had."
    net, g = MANet(7, dropout=0., **MANet.thin), torch.Generator().manual_seed(53)
    net.backbone, net.fc, net.embed = nn.Identity(), nn.Linear(12, 7), nn.Sequential(nn.Linear(12, 300), nn.Tanh(), nn.Linear(300, 300))
    with torch.no_grad():
        for fc in (net.fc, net.embed[0], net.embed[2]):
            fc.weight.copy_(torch.randn(fc.weight.shape, generator=g)/fc.in_features**.5); fc.bias.copy_(.1*torch.randn(fc.out_features, generator=g))
    return net

def test_manet_head_and_loss(golden):
    net, f = manet_head(), normal(54, 8, 12, 2, 2).requires_grad_()
    vectors = torch.zeros(7, 300)
    vectors[golden['manet/label']] = normal(55, 2, 300)
    logits, embedding = net(clips(f, 4))
    loss, terms = MANetLoss(vectors)(dict(rgb=Scores(logits, logits, match=embedding)), golden['manet/label'])
    loss.backward()
    for ours,name in ((logits, 'logits'), (embedding, 'emb'), (loss, 'loss'), (terms['rgb/ce_a'], 'ce'), (terms['rgb/mse'], 'mse'), (f.grad, 'grad_feat')):
        close(ours.detach(), golden[f'manet/{name}'])

# ---- the ResNet below

def photo_net(*blocks):
    "torchvision's ResNet with random weights and statistics."
    resnet = image_models().resnet
    torch.manual_seed(0)
    net = resnet.ResNet(resnet.Bottleneck, list(blocks))
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t,lo,hi in ((m.weight,.3,.9), (m.bias,-.1,.1), (m.running_mean,-.1,.1), (m.running_var,.5,1.5)): nn.init.uniform_(t, lo, hi)
    net.fc = nn.Identity()
    return net

def hooked(photo, net, T):
    "The photo network on frames in the batch, with what `net` does before `conv1` hooked in."
    blocks = [b for stage in net.backbone.stages() for b in stage]
    for b,c in zip(blocks, [m for n,m in photo.named_modules() if n.startswith('layer') and n.endswith('.conv1')], strict=True):
        if hasattr(b.conv1, 'mix'): c.register_forward_pre_hook(lambda m,a,mix=b.conv1.mix: (frames(mix(clips(a[0], T))),))
    return photo

@named
@pytest.mark.parametrize('training', [False, True])
def test_frames_in_the_batch(net, training):
    "The features are those of a photo network with the frames in its batch, in training (norms see the same numbers) and evaluation."
    photo, T = photo_net(1, 2, 1, 1), 4
    kw = dict(frames=T) if net is TIN else {}
    ours = net(blocks=(1,2,1,1), **kw).load_photos(photo.state_dict()).double().train(training)
    theirs = hooked(deepcopy(photo).double().train(training), ours, T)
    x = normal(0, 2*T, 3, 64, 64).double()
    with torch.no_grad(): a, b = ours.features(clips(x, T)).flatten(0, 1), theirs(x)
    assert (a-b).abs().max() <= 1e-10*b.abs().max()

@named
def test_weights_of_photographs_fit(net):
    "resnet50 fits all four as it is; what mixes frames has names of its own."
    with torch.device('meta'): state, ours = image_models().resnet50().state_dict(), net()
    plain = [k for k in ours.load_photos(state).backbone.state_dict() if '.mix.' not in k]
    assert len(plain) == len(state) - 2                                       # all but the photo network's classifier
    with pytest.raises(ValueError, match='not expected: layer1.1'): make(net).load_photos(state)

def test_tin_starts_from_tsm():
    tsm, tin = make(TSM), make(TIN)
    gap = tin.load_state_dict(tsm.state_dict(), strict=False)
    assert not gap.unexpected_keys and all('.mix.' in k for k in gap.missing_keys)

# ---- sizes

@pytest.mark.parametrize('net,n,gflops', [(TSN, 23_614_580, 65.394), (TSM, 23_614_580, 65.396), (TIN, 23_645_588, 65.396), (MANet, 32_284_252, 65.535)])
def test_paper_size(net, n, gflops):
    with torch.device('meta'):
        m = net().eval()
        with FlopCounterMode(display=False) as flops: out = scores(m(torch.empty(1, 3, 8, 224, 224)))
    assert [tuple(o.shape) for o in out] == [(1, 52), (1, 300)][:len(out)]
    assert sum(p.numel() for p in m.parameters()) == n and round(flops.get_total_flops()/1e9, 3) == gflops

def test_parts_of_manet():
    "The gates, the two heads, and what the reference carries without using it."
    with torch.device('meta'): m = MANet()
    count = lambda m: sum(p.numel() for p in m.parameters())
    gates = [g for g in m.modules() if isinstance(g, Gate)]
    assert sum(map(count, gates)) == 7_964_672 and len(gates) == 16
    assert (count(m.fc), count(m.embed[0]), count(m.embed[2])) == (106_548, 614_700, 90_300)
    C = [g.squeeze.in_features for g in gates]
    assert count(m) + sum(c*c//4 + 3*(c//4)**2 + c*c//4 for c in C) == 43_235_676

@named
def test_first_weights(net):
    torch.manual_seed(0)
    m = make(net)
    assert not m.fc.bias.any() and abs(m.fc.weight.std().item()/(.01 if net is TSN else .001) - 1) < .05
    assert m.drop.p == (.4 if net is TSN else .5) and m.backbone.layer1[0].conv3.bn.weight.all()
    for i in (p for p in m.modules() if isinstance(p, Interlace)):
        start = 4*(i.offset[-1].bias.sigmoid() - .5)
        assert (start - .5).abs().max() < 1e-3 and not i.weight.bias.any()

@named
@pytest.mark.parametrize('T,side', [(8, 64), (16, 64), (8, 32), (4, 32)])
def test_thin(net, T, side):
    "Both sizes of clips, a finite gradient for every weight, the same numbers with channels last."
    torch.manual_seed(0)
    m, x = make(net, T, dropout=0.), torch.randn(2, 6, T, side, side)
    out = scores(m(x))
    assert [tuple(o.shape) for o in out] == [(2, 52), (2, 300)][:len(out)]
    sum(o.square().sum() for o in out).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in m.parameters())
    before = scores(m.eval()(x))
    for a,b in zip(before, scores(m.to(memory_format=torch.channels_last_3d)(x))): close(a, b, 1e-4)

@named
def test_learns_four_clips(net):
    torch.manual_seed(0)
    m, x, y = make(net), torch.randn(4, 6, 8, 32, 32), torch.tensor([3, 17, 30, 51])
    opt, loss = torch.optim.AdamW(m.parameters(), 3e-3), MANetLoss(label_vectors())
    for _ in range(60):
        z = scores(m(x))
        l = loss(dict(rgb=Scores(z[0], z[0], match=z[1])), y)[0] if net is MANet else F.cross_entropy(z[0], y)
        opt.zero_grad(); l.backward(); opt.step()
    with torch.no_grad(): z = scores(m.eval()(x))
    assert (z[0].argmax(1) == y).all()
    if net is MANet:                                                         # the label vectors too: each clip's is nearest to its own action's
        assert (torch.cdist(z[1], loss.vectors).argmin(1) == y).all()

@named
def test_save_and_load(net, tmp_path):
    torch.manual_seed(0)
    m, x = make(net), torch.randn(2, 6, 8, 32, 32)
    m(x); torch.save(m.state_dict(), tmp_path/'m.pt')
    other = make(net); other.load_state_dict(torch.load(tmp_path/'m.pt', weights_only=True))
    copy = deepcopy(m)
    with torch.no_grad(): outs = [scores(n.eval()(x)) for n in (m, other, copy)]
    assert all(torch.equal(a, b) for o in outs[1:] for a,b in zip(outs[0], o))

@pytest.mark.slow
@named
def test_paper_size_trains(net):
    torch.manual_seed(0)
    m = net(dropout=0.)
    sum(o.square().mean() for o in scores(m(torch.randn(1, 3, 8, 224, 224)))).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in m.parameters())

# ---- label vectors

def test_label_vectors():
    "The same on every machine, and scaled like the released ones."
    V = label_vectors()
    assert V.shape == (52, 300) and V.dtype == torch.float32 and torch.equal(V, label_vectors())
    close(V[[0, 20, 51],[0, 150, 299]], torch.tensor([.13766782, -.31326941, .08265383]), 1e-6)
    norms, cos = V.norm(dim=1), F.normalize(V) @ F.normalize(V).T
    assert abs(V.square().mean() - .0785) < 1e-5 and 2.8 < norms.min() and norms.max() < 6.95
    assert abs((cos.sum() - 52)/(52*51) - .36) < .01
    at = MA52.actions.index
    assert cos[at('touching nose'), at('touching ears')] > .6 > .4 > cos[at('touching nose'), at('tiptoe')]

def test_label_vectors_from_a_file(tmp_path):
    V = np.random.RandomState(0).randn(52, 300)
    np.save(tmp_path/'v.npy', V)
    close(label_vectors(tmp_path/'v.npy'), torch.from_numpy(V).float())
    for bad,match in ((V[:51], r'found float64 of shape \(51, 300\); expected finite floats of shape \(52, 300\)'), (V.astype(int), 'found int64'),
                      (np.where(V > 3, np.nan, V), 'entries that are not finite')):
        np.save(tmp_path/'bad.npy', bad)
        with pytest.raises(ValueError, match=match): label_vectors(tmp_path/'bad.npy')

def test_manet_loss():
    V, y = label_vectors(), torch.arange(52)
    z = torch.zeros(52, 52)
    right = MANetLoss(V)(dict(rgb=Scores(z, z, match=V)), y)[0]
    close(right, torch.tensor(log(52)))
    both = MANetLoss(V)(dict(rgb=Scores(z, z, match=V), pose=Scores(z, z, match=V)), y)
    close(both[0], 2*right); assert len(both[1]) == 6 and not any(v.requires_grad for v in both[1].values())
    with pytest.raises(ValueError, match=r'rgb: found match of shape \(52, 52\), expected \(52, 300\)'): MANetLoss(V)(dict(rgb=Scores(z, z, match=z)), y)

# ---- wrong input

@named
@pytest.mark.parametrize('shape', [(2, 3, 8, 32, 32), (6, 8, 32, 32)])
def test_wrong_input(net, shape):
    with pytest.raises(ValueError, match=r'expected \(B,6,T,H,W\)'): make(net)(torch.zeros(shape))

def test_wrong_frames():
    with pytest.raises(ValueError, match=r'shape \(2, 6, 4, 32, 32\) have 4 frames, expected 8.*TIN\(frames=4\)'): make(TIN)(torch.zeros(2, 6, 4, 32, 32))
    with pytest.raises(ValueError, match='expected a multiple of 16; change base or div'): Interlace(24, 8)
