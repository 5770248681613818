"""What models return other than one class of each example: classes of pixels, boxes, numbers, several labels."""
