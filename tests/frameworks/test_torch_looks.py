"""How tensors are looked at: through PyTorch's C functions and through DLPack, with one outcome."""

import subprocess
import sys

import pytest
import torch
from torch.nn import Parameter

import fastopt.torch
from fastopt import _pytorch, _tensors

KINDS = (torch.Tensor, Parameter)


@pytest.fixture(params=["direct", "dlpack"], autouse=True)
def way(request):
    if request.param == "dlpack":
        assert not _tensors.look_directly([], [])
    yield request.param
    assert _pytorch._look_directly()


def test_pytorchs_own_functions_are_found():
    assert _pytorch.LOOKS_DIRECTLY


def assign_data(tensor):
    tensor.data = tensor.data.clone()


def assign_double(tensor):
    tensor.data = tensor.data.double()


def set_other(tensor):
    tensor.data.set_(torch.ones(3, 2))
    tensor.set_(torch.ones(3, 2))


def set_offset(tensor):
    tensor.set_(tensor.untyped_storage(), 1, (2, 2), (2, 1))


def resize(tensor):
    tensor.resize_(2, 3)


def transpose(tensor):
    tensor.t_()


def stretch(tensor):
    tensor.as_strided_((3, 2), (1, 3))


def unsqueeze(tensor):
    tensor.unsqueeze_(0)


def share(tensor):
    tensor.share_memory_()


def free(tensor):
    tensor.untyped_storage().resize_(0)


def swap(tensor):
    torch.utils.swap_tensors(tensor, type(tensor)(torch.ones(3, 2)))


def swap_with_meta(tensor):
    torch.utils.swap_tensors(tensor, torch.ones(3, 2, device="meta"))


def swap_with_sparse(tensor):
    torch.utils.swap_tensors(tensor, torch.ones(3, 2).to_sparse())


MOVES = [
    assign_data,
    assign_double,
    set_other,
    set_offset,
    resize,
    transpose,
    stretch,
    unsqueeze,
    share,
    free,
    swap,
    swap_with_meta,
    swap_with_sparse,
]


@pytest.mark.parametrize("kind", [torch.Tensor, Parameter], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
@torch.no_grad()
def test_a_tensor_that_has_moved_or_changed_is_noticed(move, kind):
    still = torch.zeros(2)
    tensor = kind(torch.ones(3, 2))
    watched = _tensors.Tensors(torch.Tensor, [still, tensor])
    assert watched.in_place()
    tensor.add_(1)
    tensor.requires_grad_(False)
    assert watched.in_place()
    move(tensor)
    assert not watched.in_place()
    assert _tensors.Tensors(torch.Tensor, [still]).in_place()


def test_an_empty_tensor_that_changes_its_device_is_noticed():
    tensor = torch.ones(0)
    watched = _tensors.Tensors(torch.Tensor, [tensor])
    assert watched.in_place()
    torch.utils.swap_tensors(tensor, torch.ones(0, device="meta"))
    assert not watched.in_place()


@pytest.mark.parametrize("shape", [(), (1,), (4, 2), (0, 3)], ids=str)
def test_gradients_are_followed_wherever_they_are(shape):
    param = Parameter(torch.ones(shape))
    arrays = [param.detach().numpy()]
    gradients = _tensors.Gradients(torch.Tensor, KINDS, [param], arrays, [])
    seen = [torch.full(shape, float(number)) for number in range(4)]
    for number, grad in enumerate([*seen, *reversed(seen)]):
        param.grad = grad
        (array,) = gradients.read()
        assert array.shape == shape
        assert array.size == 0 or array.ctypes.data == grad.data_ptr(), number
        assert (array == grad.numpy()).all()
        gradients.release()
    param.grad = None
    assert gradients.read() == [None]
    assert gradients.missing == 1


def test_gradients_that_lie_otherwise_are_followed_and_unfit_ones_noticed():
    class Param:  # which takes any gradient, as PyTorch's do not
        grad = None

    param, memory = Param(), torch.arange(16.0)
    gradients = _tensors.Gradients(torch.Tensor, KINDS, [param], [torch.ones(4, 2).numpy()], [])
    fit = [memory[:8].view(4, 2), memory[:8].view(2, 4).t(), memory[4:12].view(4, 2)]
    unfit = [
        torch.ones(4, 2).to_sparse(),
        torch.ones(4, 2).double(),
        torch.ones(4, 2, device="meta"),
        memory[:8].view(2, 4),
        memory[:8].view(4, 2).view(torch.int32),
        memory[:8],
    ]
    for good in [*fit, *fit]:
        for bad in unfit:
            param.grad = bad
            assert gradients.read() is None
            param.grad = good
            (array,) = gradients.read()
            assert (array == good.numpy()).all()
            assert array.strides == good.numpy().strides


def test_a_gradient_of_another_type_is_unfit_at_an_address_that_was_fit():
    class Other(torch.Tensor):
        pass

    param = Parameter(torch.ones(3))
    gradients = _tensors.Gradients(torch.Tensor, KINDS, [param], [param.detach().numpy()], [])
    param.grad = torch.ones(3)
    assert gradients.read() is not None
    param.grad = param.grad.as_subclass(Other)
    assert gradients.read() is None


def test_tensors_that_are_not_where_they_are_expected_are_read_through_dlpack():
    class Elsewhere:
        _cdata = 1
        __slots__ = ("a", "b")

    class Short:
        _cdata = 0
        __slots__ = ()

    for example in Elsewhere(), Short():
        assert not _tensors.look_directly([torch.zeros(2), example], [0] * 5)
        tensor = torch.zeros(2)
        watched = _tensors.Tensors(torch.Tensor, [tensor])  # which would call what is at 0
        assert watched.in_place()
        tensor.data = torch.zeros(2)
        assert not watched.in_place()


def test_both_ways_give_the_same_numbers(way):
    results = []
    for looks in True, False:
        if not looks:
            _tensors.look_directly([], [])
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        optimizer = fastopt.torch.Adam(model.parameters(), lr=0.1)
        for number in range(6):
            optimizer.zero_grad(set_to_none=number % 2 == 0)
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
            if number == 3:
                model[0].weight.data = model[0].weight.data.clone()
        results.append([p.detach() for p in model.parameters()])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_the_adapter_of_keras_can_do_without_that_of_pytorch():
    code = "import sys, fastopt._pytorch\nassert 'fastopt.torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("where", "directly"),
    [
        ("torch.set_default_device('meta')", True),
        ("torch._subclasses.fake_tensor.FakeTensorMode().__enter__()", False),
        ("torch.inference_mode().__enter__()", True),
    ],
)
def test_the_import_makes_tensors_of_its_own_kind_wherever_it_is(where, directly):
    code = f"""
import torch
import torch._subclasses.fake_tensor
{where}
import fastopt.torch
from fastopt import _pytorch
assert _pytorch.LOOKS_DIRECTLY is {directly}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
