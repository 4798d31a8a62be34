"""PyTorch's optimizers to compare with; all but one are PyTorch's own."""

import torch
from torch.optim import *  # noqa: F403
from torch.optim import lr_scheduler as lr_scheduler


class NAdam(torch.optim.NAdam):
    """PyTorch's, with a product of momenta as exact as the parameter.

    PyTorch rounds it to float32, which moves parameters of float64 by a relative 1e-9.
    """

    def _init_group(self, group, params_with_grad, *lists):
        has_complex = super()._init_group(group, params_with_grad, *lists)
        products = lists[3]
        for i, param in enumerate(params_with_grad):
            if param.dtype == torch.float64:
                products[i] = self.state[param]["mu_product"] = products[i].double()
        return has_complex
