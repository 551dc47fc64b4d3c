"""Medical image files from outside, read within bounds: pictures, NIfTI, DICOM, .npz and HDF5.

Every reader looks at what a header declares before it decodes (`limits.Limits`) and raises `limits.BadFile` for a file that cannot be used, whatever the
library beneath raised. No file is ever executed, unpickled or followed to another file. Import the modules: each loads one library.
"""
