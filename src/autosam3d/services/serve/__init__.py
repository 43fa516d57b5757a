"""The service: the browser app and the segmentation of scans that are sent, over HTTP. Needs the extra `serve`."""
