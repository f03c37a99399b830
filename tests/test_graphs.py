"""The networks on the skeleton graph against mmaction2's ST-GCN, AAGCN (without attention) and CTR-GCN.

tests/golden/graphs.pt keeps what the reference gave, in float32, for units, blocks and a small ST-GCN with random
weights: outputs, and for units the loss, the gradient of the input and the norms of all others in training mode.
Inputs are drawn again from their seeds. We compute in float64, so a difference is the reference's rounding."""
import re
from pathlib import Path
import pytest, torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from pcan.graphs import (AGCN, CTRGCN, LINKS, STGCN, Adaptive, Block, ChannelWise, GraphConv, ManySpeeds, Refined, TwoStreamAGCN,
                         bones, parents, subsets, temporal)

COCO = ((15,13), (13,11), (16,14), (14,12), (11,5), (12,6), (9,7), (7,5), (10,8), (8,6), (5,0), (6,0), (1,0), (3,1), (2,0), (4,2))
NTU = ((0,1), (1,20), (2,20), (3,2), (4,20), (5,4), (6,5), (7,6), (8,20), (9,8), (10,9), (11,10), (12,0), (13,12), (14,13), (15,14), (16,0),
       (17,16), (18,17), (19,18), (21,7), (22,7), (23,11), (24,11))
NETS = [STGCN, AGCN, TwoStreamAGCN, CTRGCN]

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(scope='module')
def golden(): return torch.load(Path(__file__).parent/'golden'/'graphs.pt', weights_only=True)

def close(ours, theirs):
    "To 2e-6 of the largest number."
    assert ours.shape == theirs.shape and (ours-theirs).abs().max() <= 2e-6*theirs.abs().max()

def draw(seed, *shape): return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()

# ---- graphs

@pytest.mark.parametrize('layout', ['spatial', 'stgcn_spatial'])
@pytest.mark.parametrize('name,edges,centre', [('pcan28', LINKS, 1), ('coco17', COCO, 0), ('openpose18', LINKS[:17], 1), ('ntu25', NTU, 20)])
def test_graph(golden, layout, name, edges, centre):
    torch.testing.assert_close(subsets(layout, edges, centre), golden['graphs'][f'{name}_{layout}'], atol=1e-7, rtol=0)

def test_graph_is_refused():
    with pytest.raises(ValueError, match=r"found 'uniform', expected 'spatial' or 'stgcn_spatial'"): subsets('uniform')
    with pytest.raises(ValueError, match=r'3 edges reach the joints \[0, 1, 2\] from 0'): parents(((0,1), (1,2), (0,2)), 0)

def test_bones():
    "Pair by pair, with the reference's list of parents for 18 joints and the fingers on their wrists."
    up = (0, 0, 1, 2, 3, 1, 5, 6, 2, 8, 9, 5, 11, 12, 0, 0, 14, 15, *[7]*5, *[4]*5)
    x = torch.randn(2, 3, 28, 3)
    b = bones(x)
    for v,p in enumerate(up):
        assert torch.equal(b[...,v,:2], x[...,v,:2]-x[...,p,:2]) and torch.equal(b[...,v,2], (x[...,v,2]+x[...,p,2])/2)
    with pytest.raises(ValueError, match=r'\(2, 3, 17, 3\), expected \(...,28,3\)'): bones(x[:,:,:17])

# ---- the reference's numbers

RENAMED = [(r'num_batches_tracked', None), (r'^data_bn', 'norm'), (r'^head\.fc', 'head'), (r'^gcn\.(\d)', r'blocks.\1'), (r'(^|\.)gcn1?\.', r'\1space.'),
           (r'(^|\.)tcn1?\.', r'\1time.'), (r'residual', 'shortcut'), (r'\bPA$', 'M'), (r'conv_d\.(\d)', r'subsets.\1.out'), (r'conv_a\.(\d)', r'subsets.\1.speak'),
           (r'conv_b\.(\d)', r'subsets.\1.listen'), (r'down\.0', 'down.conv'), (r'down\.1', 'down.bn'), (r'\bconvs\.', 'subsets.'), (r'conv1\.', 'speak.'),
           (r'conv2\.', 'listen.'), (r'conv3\.', 'out.'), (r'conv4\.', 'refine.'), (r'branches\.3\.0', 'branches.3.conv'), (r'branches\.3\.1', 'branches.3.bn')]

def ours(name):
    "The reference's name of a weight, in our words."
    for theirs,new in RENAMED:
        if new: name = re.sub(theirs, new, name)
    return name

def loaded(net, sd):
    missing, extra = net.load_state_dict({ours(k): v for k,v in sd.items()}, strict=False)
    assert not extra and all(k.endswith('num_batches_tracked') for k in missing)
    return net.double().eval()

A, ST = subsets(), subsets('stgcn_spatial')
UNITS = {'stgcn_block': lambda: Block(6, 8, ST, GraphConv, temporal, stride=2), 'agcn_6_8': lambda: Adaptive(6, 8, A), 'agcn_8_8': lambda: Adaptive(8, 8, A),
         'agcn_block': lambda: Block(6, 8, A, Adaptive, temporal, stride=2), 'ctrgc': lambda: ChannelWise(24, 8), 'ctr_unit_3_8': lambda: Refined(3, 8, A),
         'ctr_unit_8_8': lambda: Refined(8, 8, A), 'mstcn': lambda: ManySpeeds(8, 8, 2), 'ctr_block': lambda: Block(8, 16, A, Refined, ManySpeeds, stride=2)}

def test_draws(golden):
    "If this fails, torch draws other random numbers than it did, and the tests below say nothing about the networks."
    x = draw(*golden['units']['stgcn_block']['x']).flatten()
    assert (x[:3] - torch.tensor([-.83996457, .14799395, -.76018023])).abs().max() < 1e-6

@pytest.mark.parametrize('name', UNITS)
def test_unit(golden, name):
    g = golden['units'][name]
    net = loaded(UNITS[name](), g['sd'])
    run = (lambda x: net(x, g['A'].double(), g['alpha'].double())) if 'A' in g else net
    with torch.no_grad(): close(run(draw(*g['x'])), g['out'])
    if 'train' not in g: return
    net.train(); g, t = g, g['train']
    x, w = draw(*g['x']).requires_grad_(), draw(*g['w'])
    out = run(x); loss = (out*w).sum()/out.numel(); loss.backward()
    for a,b in ((out, t['out']), (x.grad, t['grad_in'])): close(a.detach(), b)
    assert abs(loss.item() - t['loss'].item()) < 1e-7
    norms = {k: p.grad.norm().item() for k,p in net.named_parameters()}
    theirs = dict(zip(map(ours, t['names']), t['grad_norm'].tolist()))
    assert norms.keys() == theirs.keys() and max(abs(norms[k]-theirs[k]) for k in norms) < 1e-7

def test_stgcn(golden):
    "Ten blocks for two persons, as the reference runs them: one by one, and their mean to the head."
    g = golden['units']['stgcn']
    net, x = loaded(STGCN(K=5, base=4), g['sd']), draw(*g['x'])
    with torch.no_grad():
        y = net.features(x.flatten(0,1)).unflatten(0, (2,2))
        close(y, g['out'])
        close(net.head(y.mean((1,3,4))), g['logits'])
        torch.testing.assert_close(net(x[:,0]), net.head(y[:,0].mean((2,3))))

# ---- sizes

@pytest.mark.parametrize('V,edges,centre,sizes', [
    (28, LINKS, 1, {STGCN: (3_101_564, 6.420), AGCN: (3_472_102, 7.284), CTRGCN: (1_449_254, 3.381)}),
    (17, COCO, 0,  {STGCN: (3_086_648, 3.812), AGCN: (3_457_186, 4.336), CTRGCN: (1_434_338, 1.935)})], ids=['28', '17'])
def test_paper_size(V, edges, centre, sizes):
    for Net,(parameters,gflops) in sizes.items():
        with torch.device('meta'), FlopCounterMode(display=False) as count: out = (net:=Net(edges=edges, centre=centre).eval())(torch.empty(1, 100, V, 3))
        assert (sum(p.numel() for p in net.parameters()), round(count.get_total_flops()/1e9, 3), out.shape) == (parameters, gflops, (1,52))

def test_two_streams_size():
    with torch.device('meta'): net = TwoStreamAGCN()
    assert sum(p.numel() for p in net.parameters()) == 2*3_472_102

@pytest.mark.slow
@pytest.mark.parametrize('Net', NETS)
def test_paper_size_trains(Net):
    torch.manual_seed(0)
    net = Net()
    sum(o.logsumexp(1).sum() for o in heads(net(torch.rand(1, 100, 28, 3)))).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())

# ---- thin

def heads(out): return list(out.values()) if isinstance(out, dict) else [out]

def clips(B, T, seed=0): return torch.rand(B, T, 28, 3, generator=torch.Generator().manual_seed(seed))*2 - 1

@pytest.mark.parametrize('T', [1, 4, 16, 33])
@pytest.mark.parametrize('Net', NETS)
def test_thin(Net, T):
    "Any number of frames; all weights get a gradient, and while alpha is 0 that of the clip's own graph is 0."
    torch.manual_seed(0)
    net = Net(**Net.thin)
    def gradients():
        net.zero_grad()
        out = heads(net(clips(4, T)))
        assert all(o.shape == (4,52) for o in out)
        sum(F.cross_entropy(o, torch.arange(4)) for o in out).backward()
        assert all(p.grad.isfinite().all() for p in net.parameters())
        return {k for k,p in net.named_parameters() if not p.grad.any()}
    own = {k for k,_ in net.named_parameters() if re.search('speak|listen|refine', k)}
    assert gradients() >= own
    for k,p in net.named_parameters():
        if k.endswith('alpha'): p.data.fill_(.5)
        if 'space.bn.weight' in k: p.data.fill_(1)
    assert not {k for k in gradients() if k.endswith(('weight','A','M','alpha'))}

@pytest.mark.parametrize('Net', NETS)
def test_thin_learns_and_is_kept(Net, tmp_path):
    "Eight clips by heart; the saved network answers the same, bit for bit."
    torch.manual_seed(0)
    net, x, y = Net(**Net.thin), clips(8, 8), torch.arange(8)*6
    opt = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(60):
        loss = sum(F.cross_entropy(o, y) for o in heads(net(x)))
        opt.zero_grad(); loss.backward(); opt.step()
    with torch.no_grad(): out = heads(net.eval()(x))
    assert loss < .1 and all((o.argmax(1) == y).all() for o in out)
    torch.save(net.state_dict(), tmp_path/'net.pt')
    again = Net(**Net.thin); again.load_state_dict(torch.load(tmp_path/'net.pt', weights_only=True))
    with torch.no_grad(): assert all(torch.equal(a, b) for a,b in zip(out, heads(again.eval()(x))))

@pytest.mark.parametrize('Net', NETS)
def test_wrong_input(Net):
    net = Net(**Net.thin)
    for shape in ((2,3,16,28), (2,16,17,3), (16,28,3), (2,16,28,2)):
        with pytest.raises(ValueError, match=re.escape(f'{shape}, expected (B,T,28,3)')): net(torch.zeros(shape))
    with pytest.raises(ValueError, match='base: found 6, expected a multiple of 4'): Net(base=6)

@pytest.mark.parametrize('Net', NETS)
def test_other_skeleton(Net):
    "Edges may come from JSON, as lists."
    net = Net(**Net.thin, edges=[list(e) for e in COCO], centre=0, K=7)
    assert all(o.shape == (2,7) for o in heads(net(torch.rand(2, 8, 17, 3))))
