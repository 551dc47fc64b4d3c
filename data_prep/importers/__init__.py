"""Site files from the formats hospitals and public data sets come in: pictures, NIfTI, DICOM, and presets of known folders."""
