"""The backbones against mmaction2's ResNet3dSlowOnly and RGBPoseConv3D: same weights and inputs, same numbers.

The reference was run once, in float32, on a small two-pathway network (28 joints, base 8 and 4 channels) with seeded
weights and inputs; `seeded` draws them again. tests/golden/backbones.pt keeps what came out: outputs of every stage,
in evaluation and in training mode, gradients, running means, and the names and shapes of the reference's state dicts.
Long tensors are kept with a stride.
We compute in float64, so that a difference is the reference's own rounding."""
from dataclasses import replace
from math import prod
from pathlib import Path
import pytest, torch
from torch.utils.flop_counter import FlopCounterMode
from pcan.slowonly import SlowOnly
from pcan.rgbpose import PAPER, THIN, TINY, RGBPoseConv3D, Sizes, from_reference, join_

RGB, POSE = replace(PAPER.rgb, base=8), replace(PAPER.pose, base=4)
TOL = 5e-6 # of the largest number compared: float32 rounding through 50 layers

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(scope='module')
def golden(): return torch.load(Path(__file__).parent/'golden'/'backbones.pt', weights_only=True)

def seeded(shapes, seed):
    "The weights the reference was run with: drawn tensor by tensor in the order of its state dict."
    g, out = torch.Generator().manual_seed(seed), {}
    normal, uniform = lambda s: torch.randn(s, generator=g), lambda s: torch.rand(s, generator=g)
    for k,s in shapes.items():
        match k.rsplit('.', 1)[1]:
            case 'num_batches_tracked': out[k] = torch.tensor(0)
            case 'weight' if len(s) == 5: out[k] = normal(s) / prod(s[1:])**.5
            case 'weight': out[k] = (.7 + .6*uniform(s)) * (.2 if k.endswith('conv3.bn.weight') else 1)
            case 'bias': out[k] = .05*normal(s)
            case 'running_mean': out[k] = .1*normal(s)
            case 'running_var': out[k] = .5 + uniform(s)
    return out

@pytest.fixture(scope='module')
def drawn():
    "Inputs and the weights of the loss, in the order in which they were drawn."
    g = torch.Generator().manual_seed(200)
    rgb, pose = torch.randn(2, 3, 8, 64, 64, generator=g), torch.rand(2, 28, 32, 16, 16, generator=g)
    w_rgb, w_pose = torch.randn(2, 256, 8, 2, 2, generator=g), torch.randn(2, 64, 32, 2, 2, generator=g)
    return [x.double() for x in (rgb, pose, w_rgb, w_pose)]

def close(ours, theirs, tol=TOL):
    if ours.numel() > theirs.numel(): ours = ours.flatten()[::17]
    assert ours.shape == theirs.shape
    assert (ours-theirs).abs().max() <= tol*theirs.abs().max()

def network(golden):
    net = RGBPoseConv3D(Sizes(RGB, POSE))
    net.load_state_dict(from_reference(seeded(golden['shapes'], 100)))
    return net.double()

def test_draws(golden):
    "If this fails, torch draws other random numbers than it did, and the tests below say nothing about the backbones."
    state = seeded(golden['shapes'], 100)
    for k,v in golden['drawn'].items(): assert abs(state[k].flatten()[0] - v) < 1e-6

@pytest.mark.parametrize('name,pathway,seed,which', [('rgb', RGB, 102, 0), ('pose', POSE, 101, 1)])
def test_slowonly(golden, drawn, name, pathway, seed, which):
    net = SlowOnly(pathway).double().eval()
    net.load_state_dict(seeded(golden[f'{name}_shapes'], seed))
    with torch.no_grad(): y = net(drawn[which])
    close(y[:,::4] if name == 'rgb' else y[:,:,::4], golden[f'{name}_alone'])

def test_every_stage(golden, drawn):
    net, seen = network(golden).eval(), {}
    names = {k: from_reference({k+'.': 0}).popitem()[0].rstrip('.') for k in golden['stages']}
    names |= {f'rgb_path.layer{i+2}_lateral': f'to_rgb.{i}' for i in (0,1)}
    for k,ours in names.items():
        net.get_submodule(ours).register_forward_hook(lambda m,i,o,k=k: seen.__setitem__(k, o))
    with torch.no_grad(): rgb, pose = net(*drawn[:2])
    for k,theirs in golden['stages'].items(): close(seen[k], theirs)
    close(rgb, golden['eval_rgb']); close(pose, golden['eval_pose'])

def test_training(golden, drawn):
    """Batch statistics, the gradients of a loss and the running means after one step.

    In the reference's float32 one ReLU of pose stage 1 sees a number within rounding of 0 and falls to the other side.
    That moves 2% of the pose gradient's entries a little, and the gradient of a few weights near it: so most entries
    must agree to rounding, all of them nearly."""
    net = network(golden).train()
    rgb, pose, w_rgb, w_pose = [x.clone().requires_grad_(i < 2) for i,x in enumerate(drawn)]
    a, b = net(rgb, pose)
    loss = (a*w_rgb).mean() + (b*w_pose).mean()
    loss.backward()
    close(a.detach(), golden['train_rgb']); close(b.detach(), golden['train_pose'])
    assert abs(loss.item() - golden['loss'].item()) < 1e-7
    for ours,theirs in ((rgb.grad[:,:,::2,::4,::4], golden['grad_in_rgb']),
                        (pose.grad[:,::4,::4], golden['grad_in_pose'])):
        gap = (ours-theirs).abs()
        assert gap.flatten().quantile(.95) <= 2*TOL*theirs.abs().max() and gap.norm() <= 5e-3*theirs.norm()
    norms = from_reference(golden['grad_norms'])
    gaps = torch.tensor([abs(p.grad.norm().item()/norms[k] - 1) for k,p in net.named_parameters()])
    assert gaps.median() < 1e-6 and gaps.quantile(.95) < 2e-5 and gaps.max() < 1e-2
    buffers = dict(net.named_buffers())
    for k,v in from_reference(golden['running_mean']).items(): close(buffers[k], v)

def test_paper_size(golden):
    "Names and shapes of the whole state dict, parameters and operations, without computing."
    with torch.device('meta'): net = RGBPoseConv3D(PAPER)
    assert {k: list(v.shape) for k,v in net.state_dict().items()} == from_reference(golden['paper_shapes'])
    assert sum(p.numel() for p in net.parameters()) == 36_011_456 and net.widths == (2048, 512)
    for side,total in ((224, 119_471_865_856), (256, 156_044_886_016)):
        with torch.device('meta'), FlopCounterMode(display=False) as flops:
            a, b = net(torch.empty(1, 3, 8, side, side), torch.empty(1, 28, 32, side//4, side//4))
        assert flops.get_total_flops() == total
        assert a.shape == (1, 2048, 8, side//32, side//32) and b.shape == (1, 512, 32, side//32, side//32)

@pytest.mark.parametrize('sizes', [THIN, TINY])
def test_small_sizes(sizes):
    "Both small networks take the same clips, use every weight, and give the same numbers with channels last."
    torch.manual_seed(0)
    rgb, pose = torch.randn(2, 6, 8, 64, 64), torch.rand(2, 28, 16, 24, 24)
    net = RGBPoseConv3D(sizes)
    a, b = net(rgb, pose)
    assert a.shape == (2, net.widths[0], 8, 2, 2) and b.shape == (2, net.widths[1], 16, 2, 2)
    (a.square().mean() + b.square().mean()).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in net.parameters())
    for p in net.parameters():
        assert p.shape[0] % 16 == 0 and (p.ndim < 5 or p.shape[1] % 16 == 0 or p.shape[1] in (6, 28))
    with torch.no_grad():
        before = net.eval()(rgb, pose)
        for x,y in zip(net.to(memory_format=torch.channels_last_3d)(rgb, pose), before): close(x, y, 1e-5)

def test_join():
    "A network joined from two single streams starts as these two, and says when a state does not fit."
    torch.manual_seed(0)
    rgb, pose = torch.randn(2, 6, 8, 64, 64), torch.rand(2, 28, 16, 24, 24)
    alone = [SlowOnly(THIN.rgb), SlowOnly(THIN.pose)]
    for net,x in zip(alone, (rgb, pose)): net(x); net.eval()
    joined = join_(RGBPoseConv3D(THIN), *(net.state_dict() for net in alone)).eval()
    with torch.no_grad():
        for y,net,x in zip(joined(rgb, pose), alone, (rgb, pose)): close(y, net(x), 1e-5)
    with pytest.raises((KeyError, RuntimeError)):
        join_(RGBPoseConv3D(THIN), alone[1].state_dict(), alone[0].state_dict())

def test_released_prefix(golden):
    "Of a whole recogniser's checkpoint, the backbone is taken and the head left."
    state = seeded(golden['shapes'], 100)
    whole = {'backbone.'+k: v for k,v in state.items()} | {'cls_head.fc_rgb.weight': torch.zeros(52, 256)}
    assert from_reference(whole).keys() == from_reference(state).keys()
