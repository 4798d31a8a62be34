"""PyTorch's optimizers to compare with; all but one are PyTorch's own."""

import torch
from torch.optim import *  # noqa: F403
from torch.optim import lr_scheduler as lr_scheduler


class NAdam(torch.optim.NAdam):
    """PyTorch's, with a product of momenta as exact as the parameter.

    PyTorch rounds it to float32, which moves parameters of float64 by a relative 1e-9; and in
    loading to the parameter's type.
    """

    def _init_group(self, group, params_with_grad, *lists):
        has_complex = super()._init_group(group, params_with_grad, *lists)
        products = lists[3]
        for i, param in enumerate(params_with_grad):
            if param.dtype == torch.float64:
                products[i] = self.state[param]["mu_product"] = products[i].double()
        return has_complex

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for key, param in zip(keys, params, strict=True):
            if key in state_dict["state"]:
                product = state_dict["state"][key]["mu_product"]
                wide = torch.promote_types(product.dtype, torch.float32)
                self.state[param]["mu_product"] = product.to(wide)
