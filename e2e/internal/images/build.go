package images

import (
	"context"
	"io"
)

func Build(ctx context.Context, bin, dir string, progress io.Writer) error { return nil }
