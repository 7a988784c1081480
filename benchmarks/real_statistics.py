"""Statistics of real healthy T1w scans on the study's grid, for the table in nbs/11_phantom.ipynb: python benchmarks/real_statistics.py --data DIR (DIR holds manifest.csv)."""
import argparse, json
from uad_study.phantom import healthy, image_statistics
from uad_study.prepare import iter_real_t1
from uad_study.core import UadError
from uad_study.runs import parallel_map

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--data", required=True)
    p.add_argument("--virtual", type=int, default=16, help="virtual subjects beside them")
    a = p.parse_args()
    rows = [r for r in iter_real_t1(a.data, alphas=(1.0,), pmap=parallel_map) if not isinstance(r, UadError) and r["pathology"] == "healthy"]
    real = image_statistics([r["image"] for r in rows], [r["brain_mask"] for r in rows], 24)
    made = [healthy(9000 + s, ("T1w",)) for s in range(a.virtual)]
    virtual = image_statistics([s.images["T1w"] for s in made], [s.brain_mask for s in made], 24)
    print(f"{len(rows)} real subjects, {len(made)} virtual ones")
    for k in real: print(f"{k:28} real {real[k]:8.4f}  virtual {virtual[k]:8.4f}  ratio {virtual[k] / real[k]:.2f}")
    print(json.dumps({k: round(v, 4) for k, v in real.items()}))
