/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* bcc brings its own bpf.h; a second one would define every enum twice. */
#include "/virtual/include/bcc/bpf.h"
