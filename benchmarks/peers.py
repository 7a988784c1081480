"What the benchmarks measure against, written with packages that anyone can install."
import importlib.util, itertools, subprocess, sys, types
from pathlib import Path
import numpy as np, torch

FIRST_PHANTOM = "ea68019"
"The commit with the first version of the virtual subjects."


def first_phantom():
    "The module `phantom` of the first version, read from git's history; it works with today's `core` and `volume`."
    r = subprocess.run(["git", "-C", Path(__file__).parent, "show", f"{FIRST_PHANTOM}:uad_study/phantom.py"], capture_output=True, text=True)
    if r.returncode: sys.exit(f"error: git has no commit {FIRST_PHANTOM} with the first virtual subjects here: clone the whole history, or leave out the row 'phantom'")
    module = sys.modules["uad_study.first_phantom"] = types.ModuleType("uad_study.first_phantom")
    module.__package__ = "uad_study"
    exec(compile(r.stdout, f"phantom.py of {FIRST_PHANTOM}", "exec"), module.__dict__)
    return module


def opensimplex_tables(n: int, first: int = 0) -> list:
    "`n` tables of gradients of the opensimplex package, of the seeds from `first` on."
    if not importlib.util.find_spec("numba"): sys.exit("error: opensimplex needs numba for this comparison: pip install numba (make dev does)")
    from opensimplex import OpenSimplex
    return [OpenSimplex(first + i) for i in range(n)]


def opensimplex_fields(tables, size: int, octaves: int = 6, persistence: float = .8, frequency: float = 64) -> np.ndarray:
    "For each table the sum of octaves (n, size, size), pixel (0, 0) at the origin, as the released code of Behrendt et al. 2024 adds them."
    at = [np.arange(size) / (frequency / 2**o) for o in range(octaves)]
    return np.stack([sum(persistence**o * t.noise2array(a, a) for o, a in enumerate(at)).T for t in tables])


class MonaiDenoiser(torch.nn.Module):
    "The network of a `Denoiser` of `config` as MONAI has it: the same function, and the same names of weights. `patch` pixels are folded into channels before it, as ours are."
    def __init__(self, config):
        from monai.networks.nets import DiffusionModelUNet
        super().__init__()
        c, self.patch, planes = config, config.patch, config.patch**2
        self.unet = DiffusionModelUNet(2, planes, planes, c.num_res_blocks, c.channels, (False,) * len(c.channels), c.norm_num_groups, resblock_updown=True, num_head_channels=c.num_head_channels)

    def forward(self, x, t):
        from torch.nn.functional import pixel_shuffle, pixel_unshuffle
        return pixel_shuffle(self.unet(pixel_unshuffle(x, self.patch), t), self.patch)


class MonaiLoop:
    """The training loop of MONAI's DDPM tutorial on slices (n, 1, H, W) in [0, 1]: CacheDataset, DataLoader, DiffusionInferer, Adam; predicting the sample with an L1 loss, by the network `denoiser` (f(x_t, t), as `MonaiDenoiser`).

    `simplex`: with noise of the opensimplex package, else `torch.randn`. `amp`: the tutorial's autocast to float16 with a GradScaler (on the CPU to bfloat16 without one)."""
    def __init__(self, slices, denoiser, batch_size, lr, simplex=False, amp=False, device="cpu"):
        from monai.data import CacheDataset, DataLoader
        from monai.inferers import DiffusionInferer
        from monai.networks.schedulers import DDPMScheduler
        from monai.transforms import Compose, EnsureTyped
        class Network(torch.nn.Module):                    # the face that the inferer calls
            def __init__(self): super().__init__(); self.denoiser = denoiser
            def forward(self, x, timesteps, context=None): return self.denoiser(x, timesteps)
        data = CacheDataset([dict(image=s) for s in slices], Compose([EnsureTyped("image")]), progress=False)
        self.loader, self.device, self.simplex, self.amp = DataLoader(data, batch_size=batch_size, shuffle=True, num_workers=0, drop_last=True), torch.device(device), simplex, amp
        self.network, scheduler = Network().to(device).train(), DDPMScheduler(1000, schedule="cosine", prediction_type="sample")
        self.inferer, self.optimizer = DiffusionInferer(scheduler), torch.optim.Adam(self.network.parameters(), lr=lr)
        self.scaler, self.batches = torch.amp.GradScaler("cuda", enabled=amp and self.device.type == "cuda"), iter(())
        self.seeds = itertools.count(0, batch_size)

    def loss(self, images, noise, timesteps):
        with torch.autocast(self.device.type, torch.float16 if self.device.type == "cuda" else torch.bfloat16, enabled=self.amp):
            prediction = self.inferer(inputs=images, diffusion_model=self.network, noise=noise, timesteps=timesteps)
            return torch.nn.functional.l1_loss(prediction.float(), images)

    def step(self) -> float:
        try: batch = next(self.batches)
        except StopIteration: self.batches = iter(self.loader); batch = next(self.batches)
        images = 2 * batch["image"].to(self.device) - 1
        self.optimizer.zero_grad(set_to_none=True)
        noise = torch.from_numpy(opensimplex_fields(opensimplex_tables(len(images), next(self.seeds)), images.shape[-1])[:, None]).float().to(self.device) if self.simplex else torch.randn_like(images)
        loss = self.loss(images, noise, torch.randint(0, 1000, (len(images),), device=self.device).long())
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer); self.scaler.update()
        return loss.item()
