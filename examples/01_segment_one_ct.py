"""Segment one CT with a trained model and print the volume of each organ.

    python examples/01_segment_one_ct.py runs/openkbp scan.nii.gz organs.nii.gz
"""

import sys

import autosam3d

model_folder, scan, output = sys.argv[1:]

model = autosam3d.load_model(model_folder)
ct = autosam3d.read_ct(scan)  # NIfTI file or DICOM folder; voxels in HU, [z, y, x]
organs = autosam3d.segment(ct, model)  # labels on the scan's own grid
autosam3d.write_segmentation(output, organs, model.recipe.labels)

for value, name in organs.organs.items():
    print(f"{name:25} {organs.volume_ml(value):8.1f} ml")
