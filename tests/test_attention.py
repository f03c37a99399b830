"""Video Swin, TimeSformer and UniFormer against the reference implementation (mmaction2 1.x): same weights and inputs, same numbers.

The reference was run once, in float32, on small sizes with seeded weights and inputs; `drawn` draws the inputs again.
tests/golden/attention.pt keeps its weights and what came out: of TimeSformer the tokens after every block and the class token,
of UniFormer one local and one global block, in evaluation and in training mode with gradients, and a whole network up to its last norm."""
import json, re
from pathlib import Path
import pytest, torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from pcan.attention import Block, DropPath, SelfAttention, TimeSformer, UniFormer, VideoSwin, _timesformer, from_uniformer, pretrained
from pcan.slowonly import image_models

TOL = 1e-5
NETS = [VideoSwin, TimeSformer, UniFormer]
B = dict(depths=(5,8,20,7)) # UniFormer-B

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(scope='module')
def golden(): return torch.load(Path(__file__).parent/'golden'/'attention.pt', weights_only=True)

def drawn(seed, *shape): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
def close(ours, theirs, tol=TOL): torch.testing.assert_close(ours, theirs, atol=tol, rtol=0)
def thin(cls, T=8, side=64, seed=0, **kw):
    torch.manual_seed(seed)
    return cls(**cls.thin | (dict(frames=T, size=side) if cls is TimeSformer else {}) | kw)
def count(net): return sum(p.numel() for p in net.parameters())

# ---- against the reference

def from_mmaction(name):
    "A tensor of mmaction2's TimeSformer under the name it has in transformers."
    for theirs,ours in (('transformer_layers.layers', 'encoder.layer'), ('patch_embed.', 'patch_embeddings.'), ('pos_embed', 'position_embeddings'),
                        ('time_embed', 'time_embeddings'), ('attentions.0.norm', 'temporal_layernorm'), ('attentions.0.temporal_fc', 'temporal_dense'),
                        ('attentions.0.attn', 'temporal_attention'), ('attentions.1.norm', 'layernorm_before'), ('attentions.1.attn', 'attention'),
                        ('in_proj_', 'attention.qkv.'), ('out_proj', 'output.dense'), ('ffns.0.norm', 'layernorm_after'),
                        ('ffns.0.layers.0.0', 'intermediate.dense'), ('ffns.0.layers.1', 'output.dense')):
        name = name.replace(theirs, ours)
    if re.match('cls_token|patch_emb|position_emb|time_emb', name): name = 'embeddings.' + name
    return 'timesformer.' + re.sub(r'^norm\.', 'layernorm.', name)

def test_timesformer(golden):
    "After the embedding, after every block, and the class token."
    g = golden['timesformer']
    net = TimeSformer(5, frames=4, size=32, patch=8, embed=24, depth=2, heads=4).eval()
    head = net.net.classifier.weight.clone()
    pretrained(net, {from_mmaction(k): v for k,v in g['sd'].items()})
    assert torch.equal(net.net.classifier.weight, head)
    seen, parts = {}, net.net.timesformer
    keep = lambda name: lambda m,i,o: seen.__setitem__(name, o[0] if isinstance(o, tuple) else o)
    parts.embeddings.register_forward_hook(keep('tokens_in'))
    for i,block in enumerate(parts.encoder.layer): block.register_forward_hook(keep(f'layer{i}'))
    net.net.classifier.register_forward_hook(lambda m,i,o: seen.__setitem__('out', i[0]))
    with torch.no_grad(): net(drawn(47, 2, 3, 4, 32, 32))
    for name in ('tokens_in', 'layer0', 'layer1'): close(seen[name], g['acts'][name])
    close(seen['out'], g['out'])

@pytest.mark.parametrize('kind,heads,shape,seed', [('local', 0, (2,8,4,6,5), 36), ('global', 4, (2,16,3,4,5), 39)])
def test_uniformer_block(golden, kind, heads, shape, seed):
    "Output; and in training mode output, loss, and the gradients of input and weights."
    g = golden['uniformer'][kind]
    block = Block(shape[1], heads)
    name = lambda k: from_uniformer('blocks1.0.'+k).removeprefix('stages.0.1.')
    block.load_state_dict({name(k): v for k,v in g['sd'].items()})
    x, w, t = drawn(seed, *shape).requires_grad_(), drawn(seed+1, *shape), g['train']
    with torch.no_grad(): close(block.eval()(x), g['out_eval'])
    out = block.train()(x)
    loss = (out*w).sum()/out.numel()
    loss.backward()
    close(out.detach(), t['out']); close(x.grad, t['grad_in'])
    assert abs(loss.item() - t['loss']) < TOL
    norms = {name(k): v for k,v in t['grad_norm'].items()}
    assert norms.keys() == dict(block.named_parameters()).keys()
    for k,p in block.named_parameters(): assert abs(p.grad.norm().item() - norms[k]) < TOL, k

def test_uniformer(golden):
    "A whole network under the reference's names, up to the norm before the mean."
    g, seen = golden['uniformer']['net'], []
    net = UniFormer(5, widths=(8,16,32,32), depths=(1,1,1,1), head_dim=16).eval()
    pretrained(net, {'backbone.'+k: v for k,v in g['sd'].items()} | {'cls_head.fc_cls.weight': torch.zeros(400, 32)})
    net.norm.register_forward_hook(lambda m,i,o: seen.append(o))
    with torch.no_grad(): y = net(drawn(42, 1, 3, 8, 64, 64))
    close(seen[0], g['out_eval']); close(y, net.fc(g['out_eval'].mean((2,3,4))))

def test_swin_is_torchvisions():
    "Without dropout's layer, which has no weights, it is `swin3d_t`: same names, same numbers."
    torch.manual_seed(0)
    theirs = image_models().video.swin3d_t(num_classes=52).eval()
    ours = VideoSwin().eval()
    ours.net.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad(): assert torch.equal(ours(x), theirs(x))

@pytest.mark.parametrize('cls,kw,T,total,flops', [
    (VideoSwin, {}, 32, 27_890_458, 175.528), (TimeSformer, {}, 8, 121_298_740, 391.660), (UniFormer, {}, 16, 21_221_876, 83.325),
    (UniFormer, B, 16, 49_634_676, 193.107), (UniFormer, B, 32, 49_634_676, 516.502)])
def test_paper_size(cls, kw, T, total, flops):
    with torch.device('meta'), FlopCounterMode(display=False) as counter:
        net = cls(**kw).eval()
        assert net(torch.empty(1, 3, T, 224, 224)).shape == (1, 52)
    assert count(net) == total and round(counter.get_total_flops()/1e9, 3) == flops
    head = sum(v.numel() for k,v in net.state_dict().items() if k.startswith(net.head))
    assert head == {VideoSwin: 39_988, TimeSformer: 39_988, UniFormer: 26_676}[cls]

@pytest.mark.slow
@pytest.mark.parametrize('cls,T', [(VideoSwin, 32), (TimeSformer, 8), (UniFormer, 16)])
def test_paper_size_trains(cls, T):
    torch.manual_seed(0)
    net = cls()
    F.cross_entropy(net(torch.randn(1, 3, T, 224, 224)), torch.tensor([3])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())

# ---- thin sizes

SMALL = {VideoSwin: 343_930, TimeSformer: 316_276, UniFormer: 381_428}

@pytest.mark.parametrize('T,side', [(8,64), (16,64), (8,32), (4,32)])
@pytest.mark.parametrize('cls', NETS)
def test_thin(cls, T, side):
    "The clips of the benchmark and of the smoke tests; every weight gets a finite gradient; arguments survive JSON."
    net = thin(cls, T, side, **json.loads(json.dumps(cls.thin)))
    y = net(torch.randn(2, 6, T, side, side))
    F.cross_entropy(y, torch.tensor([0, 1])).backward()
    assert y.shape == (2, 52) and all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    if side == 64:
        if cls is TimeSformer: idle = [k for k,p in net.named_parameters() if not p.grad.any()]
        else: idle = []
        assert all('temporal_attention' in k or 'temporal_layernorm' in k for k in idle) # behind temporal_dense, which starts at 0
        if T == 8: assert count(net) == SMALL[cls]

def test_the_temporal_branch_wakes_up():
    "After the first step its last layer is no longer 0, and after the second every weight of it has a gradient."
    net, x, y = thin(TimeSformer), torch.randn(2, 6, 8, 64, 64), torch.tensor([0, 1])
    opt = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(2): opt.zero_grad(); F.cross_entropy(net(x), y).backward(); opt.step()
    assert all(p.grad.any() for p in net.parameters())

@pytest.mark.parametrize('cls', NETS)
def test_overfits_four_clips(cls):
    net, x, y = thin(cls), drawn(1, 4, 6, 8, 64, 64), torch.tensor([3, 14, 15, 51])
    opt = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(40):
        loss = F.cross_entropy(net.train()(x), y)
        opt.zero_grad(); loss.backward(); opt.step()
    with torch.no_grad(): assert (net.eval()(x).argmax(1) == y).all()

@pytest.mark.parametrize('cls', NETS)
def test_saved_and_loaded(cls, tmp_path):
    x, a, b = drawn(2, 2, 6, 8, 64, 64), thin(cls).eval(), thin(cls, seed=1).eval()
    torch.save(a.state_dict(), tmp_path/'a.pt')
    with torch.no_grad():
        assert not torch.equal(a(x), b(x))
        b.load_state_dict(torch.load(tmp_path/'a.pt', weights_only=True))
        assert torch.equal(a(x), b(x))

@pytest.mark.parametrize('cls', NETS)
def test_channels_last(cls):
    "The memory format of the trainer changes no number (only 3D convolutions have it)."
    x, net = drawn(2, 2, 6, 8, 64, 64), thin(cls).eval()
    with torch.no_grad():
        before = net(x)
        for m in net.modules():
            if isinstance(m, torch.nn.Conv3d): m.to(memory_format=torch.channels_last_3d)
        close(net(x.to(memory_format=torch.channels_last_3d)), before)

# ---- what does not fit

@pytest.mark.parametrize('cls', NETS)
@pytest.mark.parametrize('shape', [(2,8,6,64,64), (2,3,8,64,64), (6,8,64,64)])
def test_other_clips_are_refused(cls, shape):
    want = '8,64,64' if cls is TimeSformer else 'T,H,W'
    with pytest.raises(ValueError, match=re.escape(f'input of shape {shape}, expected (B,6,{want})') + '.*in_channels'): thin(cls)(torch.zeros(shape))

@pytest.mark.parametrize('T,side', [(4,64), (16,64), (8,32)])
def test_timesformer_is_built_for_its_clips(T, side):
    with pytest.raises(ValueError, match=re.escape(f'(1, 6, {T}, {side}, {side}), expected (B,6,8,64,64)')): thin(TimeSformer)(torch.zeros(1, 6, T, side, side))

def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match='side 60 cannot be cut into patches of side 16'): thin(TimeSformer, side=60)
    with pytest.raises(ValueError, match='16x32 pixels, expected at least 32x32'): thin(UniFormer)(torch.zeros(1, 6, 8, 16, 32))
    with pytest.raises(ValueError, match='5 heads cannot share 64 channels'): SelfAttention(64, 5)

# ---- weights of others

def test_published_weights(monkeypatch):
    "The libraries' loaders are asked for the right weights (nothing is downloaded here: they give random ones of 400 classes)."
    asked = []
    swin, former = thin(VideoSwin, K=400), thin(TimeSformer, K=400)
    def download(url, *args, **kw): asked.append(url); return swin.net.state_dict()
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', download)
    monkeypatch.setattr(_timesformer()[1], 'from_pretrained', lambda name: asked.append(name) or former.net)
    for theirs in (swin, former):
        ours = thin(type(theirs), seed=1)
        fresh = {k: v.clone() for k,v in ours.state_dict().items() if k.startswith(ours.head)}
        assert pretrained(ours) is ours and len(fresh) == 2
        for k,v in ours.state_dict().items(): assert torch.equal(v, fresh[k] if k in fresh else theirs.state_dict()[k])
    assert re.search(r'swin3d_t-\w+\.pth$', asked[0]) and asked[1] == 'facebook/timesformer-base-finetuned-k400'

@pytest.mark.parametrize('cls,change,match', [
    (VideoSwin, dict(in_channels=3), r'patch_embed.proj.weight found \(48, 6, 2, 8, 8\), expected \(48, 3, 2, 8, 8\)'),
    (VideoSwin, dict(depths=(2,4)), 'missing: net.features.2.2'),
    (TimeSformer, dict(depth=2), 'not expected: net.timesformer.encoder.layer.2'),
    (TimeSformer, dict(frames=16), r'time_embeddings found \(1, 8, 64\), expected \(1, 16, 64\)')])
def test_other_weights_are_refused(cls, change, match):
    state = thin(cls).net.state_dict()
    with pytest.raises(ValueError, match=f'do not fit this {cls.__name__}.*{match}'): pretrained(thin(cls, **change), state)

def test_uniformer_needs_a_file(golden):
    with pytest.raises(ValueError, match='no library offers weights of UniFormer'): pretrained(thin(UniFormer))
    with pytest.raises(ValueError, match='missing: stages.0.2.pos.weight'):
        pretrained(UniFormer(widths=(8,16,32,32), depths=(2,1,1,1), head_dim=16), golden['uniformer']['net']['sd'])

def test_drop_path():
    "The first block is never left out, the last one with the rate asked for; the mean over draws is the input."
    net = thin(UniFormer, drop_path=.2)
    rates = [m.p for m in net.modules() if isinstance(m, DropPath)]
    assert rates[0] == 0 and abs(rates[-1]-.2) < 1e-7 and rates == sorted(rates)
    torch.manual_seed(0)
    x = DropPath(.2)(torch.ones(20000, 1))
    assert abs(x.mean() - 1) < .02 and set(x.unique().tolist()) == {0., 1.25}
