"""How hard the virtual lesions are: Dice of a plain intensity threshold (found on 12 subjects, judged on 28), volumes and contrasts per pathology: python benchmarks/calibration.py [tumour ...]."""
import sys
import numpy as np
from uad_study.metrics import best_threshold, dice
from uad_study.phantom import PATHOLOGIES, diseased
from uad_study.postprocess import components, postprocess
from uad_study.volume import VOXEL_ML

if __name__ == "__main__":
    for pathology in sys.argv[1:] or PATHOLOGIES:
        contrast = PATHOLOGIES[pathology]
        subjects = [diseased(500 + i, pathology) for i in range(40)]
        images, twins, lesions = ([f(s) for s in subjects] for f in (lambda s: s.images[contrast], lambda s: s.twins[contrast], lambda s: s.lesion_mask))
        maps = [postprocess(x if contrast == "T2w" else 1 - x, s.brain_mask) for x, s in zip(images, subjects)]          # on T1w lesions are dark
        threshold, _ = best_threshold(np.stack(maps[:12]), np.stack(lesions[:12]))
        found = np.mean([dice(components(m > threshold), t) for m, t in zip(maps[12:], lesions[12:])])
        ml = np.percentile([t.sum() * VOXEL_ML for t in lesions], (5, 50, 95))
        contrasts = np.percentile([np.abs(x - w)[t].mean() for x, w, t in zip(images, twins, lesions)], (5, 50, 95))
        print(f"{pathology:7} {contrast}  Dice of intensity {found:.3f}   mL {ml.round(1)}   contrast to the twin {contrasts.round(3)} (5, 50, 95 %)")
